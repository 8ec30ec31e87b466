"""Benchmarks: what a round costs besides training, next to what the machine permits."""
