"""Where the weights live: the Engine protocol and its implementations."""
