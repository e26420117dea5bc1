"""Benchmarks: `make bench` runs them all, prints tables and writes JSON into benchmarks/results/."""
