"""Processes and what they say to each other; every collective of hpccl."""
