"""A stage: its YAML as typed settings, and the datasets that it names."""
