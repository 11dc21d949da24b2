"""Processes of a run: ranks, watchdog, signals, console output."""
