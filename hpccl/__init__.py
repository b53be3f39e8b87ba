"""hpccl: continual learning of image classifiers on a stream of tasks, from one process to many nodes."""

__version__ = "0.1.0"
