"""Annotators: they look at the images of all scanned rows before the plan, and give columns for filters."""
