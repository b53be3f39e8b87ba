"""Optimisers that take gradients at other weights than those that they hold; all their updates are element-wise."""
