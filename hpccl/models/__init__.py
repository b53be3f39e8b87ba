"""Networks: timm's, the papers' small ones, and dropout whose noise depends on the example."""
