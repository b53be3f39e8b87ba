"""Events, metrics, reports and comparisons of runs, made from run folders alone. Never imports torch."""
