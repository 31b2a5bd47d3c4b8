"""Numerics checked against fp64 on this machine: a table of cases, a tolerance policy, a scorecard."""
