"""Preference data: reading records, applying chat templates, tokenising, packing into batches."""
