"""Curvature of a task's loss: measured from a model and its data, and held as a Precision over the weights."""
