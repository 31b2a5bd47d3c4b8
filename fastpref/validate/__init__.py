"""`fastpref validate`: checks the numerics on this machine against fp64. Cases, tolerances, a scorecard."""
