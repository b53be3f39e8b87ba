"""Carrying a run out: in this process, or in several on this machine."""
