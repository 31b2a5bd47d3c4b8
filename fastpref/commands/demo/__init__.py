"""`fastpref demo`: one training run, and a comparison of its next steps with TRL."""
