"""The memory map of a run: what each training example is worth to the network."""
