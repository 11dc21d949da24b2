"""Scorer models: frozen, for the public benchmarks."""
