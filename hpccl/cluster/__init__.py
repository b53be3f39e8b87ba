"""Executing runs: in this process, in several on this machine, or as SLURM jobs."""
