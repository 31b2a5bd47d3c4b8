"""Benchmarks of fastpref against its own matrix products, eager PyTorch and other libraries. See README.md here."""
