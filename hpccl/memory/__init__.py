"""Examples of past tasks: choosing and keeping them."""
