"""What a run says: events, metrics, reports and comparisons, made from run folders alone. Never imports torch."""
