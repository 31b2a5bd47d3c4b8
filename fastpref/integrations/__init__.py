"""fastpref in the trainer that you already have: one module a host."""
