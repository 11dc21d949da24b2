"""A run's report: curves and data."""
