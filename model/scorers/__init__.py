"""Frozen scorer models of the public benchmarks."""
