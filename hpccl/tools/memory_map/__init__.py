"""The memory map of a run: how important each training example is to the network."""
