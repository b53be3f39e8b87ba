"""Kronecker-factored matrices B (x) A: products, eigenbases and mergers; tensors only, no process and no model."""
