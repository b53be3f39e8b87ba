"""The callables that submitit runs in SLURM jobs. They are pickled, so they hold only names; state is in the folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["CommandJob", "TrainJob"]


@dataclass(frozen=True)
class TrainJob:
    """One rank of a run, in every start of its job.

    folder: the prepared run folder
    command: the user's command line, for the record
    """

    folder: str
    command: tuple[str, ...]

    def __call__(self) -> None:
        """Train, and end this process."""
        from hpccl.cluster.step import end, fail_step, run_step
        from hpccl.config.load import load_recorded
        from hpccl.errors import HpcclError
        from hpccl.folder import RunFolder

        folder = RunFolder(Path(self.folder))
        try:
            config = load_recorded(folder.config)
        except HpcclError as error:
            end(fail_step(folder, error))
        end(run_step(config, self.command, leader_log=True))

    def checkpoint(self) -> Any:
        """Submitit's protocol, unused once training starts: hpccl's own signal handlers replace submitit's."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


@dataclass(frozen=True)
class CommandJob:
    """Another `hpccl` command, in one process; it is repeated if its job is requeued.

    arguments: those after `hpccl`
    """

    arguments: tuple[str, ...]

    def __call__(self) -> None:
        """Replace this process by the command, so that its exit code is the command's."""
        import os
        import sys

        os.execv(sys.executable, [sys.executable, "-m", "hpccl.cli", *self.arguments])  # noqa: S606 - no shell

    def checkpoint(self) -> Any:
        """See TrainJob."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)
