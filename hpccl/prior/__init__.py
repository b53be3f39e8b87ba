"""The prior: how memory, curvature and old weights constrain the training of a new task."""
