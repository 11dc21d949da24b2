"""Prompt following, scored on scenes, and by position in the prompt."""
