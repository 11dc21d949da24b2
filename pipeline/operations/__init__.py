"""Code behind the scripts in `cluster/`: attempts, checks before a start, checks of the nodes."""
