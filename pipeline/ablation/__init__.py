"""The ablation table: its rows and its page."""
