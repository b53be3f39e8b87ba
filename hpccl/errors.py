"""Every error that hpccl raises on purpose.

HpcclError                     something a user can fix; the command prints it without a traceback
├── ConfigError                a configuration is wrong: one line per mistake
├── DataError                  images or shards are missing, truncated, altered or undecodable
├── FolderError                a run folder cannot be used (another configuration, no permission, disk full)
│   └── CheckpointError        a checkpoint is damaged or of an unknown format
├── WorldError                 the cause is outside this process: others cannot be reached, died or failed
│   └── StragglerError         a process did not answer within cluster.timeout
├── CapacityError              the memory of the machine or of a device has run out
├── CoverageError              a parameter that the curvature was asked to cover is not covered
└── DivergedError              the loss or its gradient is not finite

A message says what is wrong, the value, what is allowed and what to do.
"""

__all__ = [
    "CapacityError",
    "CheckpointError",
    "ConfigError",
    "CoverageError",
    "DataError",
    "DivergedError",
    "FolderError",
    "HpcclError",
    "StragglerError",
    "WorldError",
]


class HpcclError(Exception):
    """Something a user can fix."""


class ConfigError(HpcclError):
    """A configuration is wrong."""


class DataError(HpcclError):
    """Images or shards are missing, truncated, altered or undecodable."""


class FolderError(HpcclError):
    """A run folder cannot be used."""


class CheckpointError(FolderError):
    """A checkpoint is damaged or of an unknown format."""


class WorldError(HpcclError):
    """The cause is outside this process: others cannot be reached, one died or reports a failure, or SLURM refuses."""


class StragglerError(WorldError):
    """A process did not answer within cluster.timeout."""


class CapacityError(HpcclError):
    """The memory of the machine or of a device has run out."""


class CoverageError(HpcclError):
    """A parameter that the curvature was asked to cover is not covered."""


class DivergedError(HpcclError):
    """The loss or its gradient is not finite."""
