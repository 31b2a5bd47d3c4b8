"""Benchmarks of fastpref against its own matrix products, eager PyTorch and the peers. See README.md here."""
