"""Which matrix products run, over which rows, in how much memory."""
