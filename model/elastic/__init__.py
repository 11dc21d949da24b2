"""Elastic networks: one set of weights for several depths and sizes of patches."""
