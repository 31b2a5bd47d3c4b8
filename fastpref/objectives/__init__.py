"""The public losses, log-probs of tokens, KL, and what goes with them: what `fastpref` itself exports.

This is the top of the road that a loss takes: objectives -> ops -> plans -> backends. Here arguments are checked and a
plan is chosen. The formulas stand in `fastpref.reference`.
"""
