"""The process group, collectives, and tensors that are spread over ranks."""
