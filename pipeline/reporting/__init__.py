"""Curves and data of a run's report."""
