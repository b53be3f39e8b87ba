"""From a model and its data to a Precision: what a task's examples say about the weights, to second order."""
