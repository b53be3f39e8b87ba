"""Launching runs: in this process, in several on this machine, or as SLURM jobs; their status, logs and end."""
