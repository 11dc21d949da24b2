"""The rows and the page of the ablation table."""
