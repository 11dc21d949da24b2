"""The speedrun: rules, records and leaderboard of `python -m pipeline.speedrun`."""
