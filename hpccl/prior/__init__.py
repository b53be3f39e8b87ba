"""What the past says while a new task is learned."""
