"""Training engines, which differ in where the weights live: the Engine protocol and its implementations."""
