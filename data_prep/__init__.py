"""Preparation of a dataset: `python -m data_prep COMMAND`, its settings, workers and report."""
