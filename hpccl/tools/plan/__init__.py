"""Planning a run's cost before it starts: memory, communication, and the time of a step by its parts."""
