"""What the scripts in `cluster/` call: attempts, checks before a start, checks of the nodes."""
