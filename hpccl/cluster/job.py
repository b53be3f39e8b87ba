"""What a SLURM job made by submitit runs. Pickled for the job, so it holds names alone: the state is in the folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["CommandJob", "TrainJob"]


@dataclass(frozen=True)
class TrainJob:
    """One rank of a run, in every start of its job.

    folder: the run folder, prepared
    command: what the user typed, for the record
    """

    folder: str
    command: tuple[str, ...]

    def __call__(self) -> None:
        """Train to the end of this process."""
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
        """Submitit's protocol; hpccl's own signal handlers replace submitit's before anything is learned."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


@dataclass(frozen=True)
class CommandJob:
    """Another `hpccl` command, in one process; it is repeated if its job is started again.

    arguments: without `hpccl`
    """

    arguments: tuple[str, ...]

    def __call__(self) -> None:
        """Run it to the end of this process, with its exit code."""
        import os
        import sys

        os.execv(sys.executable, [sys.executable, "-m", "hpccl.cli", *self.arguments])  # noqa: S606 - no shell

    def checkpoint(self) -> Any:
        """See TrainJob."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)
