"""`fastpref demo`: one training run, and a comparison with eager PyTorch."""
