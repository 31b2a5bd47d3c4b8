"""`fastpref train`: options, the run, the files that it leaves."""
