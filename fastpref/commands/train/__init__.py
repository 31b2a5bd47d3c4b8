"""`fastpref train`: its options, the run, and the files that a run leaves."""
