"""Kronecker-factored matrices B (x) A: products, eigenbases and merging; tensors only, no processes and no models."""
