"""What `fastpref NAME` runs."""
