"""From images on disk to batches of a stream of tasks."""
