"""Networks: timm, the papers' small nets, dropout that belongs to the example."""
