"""fastpref inside the trainer that you already have: one module for each host library."""
