"""The commands, `python -m pipeline.NAME`. Everything that they share is in the sub-packages."""
