"""Benchmarks: what an example is, where its data come from, which texts a model reads."""
