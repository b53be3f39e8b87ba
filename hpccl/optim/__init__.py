"""Optimisers that take gradients at other weights than those they hold; everything in them is element-wise."""
