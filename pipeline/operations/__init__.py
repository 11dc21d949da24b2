"""Slurm jobs: the code behind the scripts in `cluster/`, such as attempts and checks of the nodes."""
