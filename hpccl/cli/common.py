"""Arguments that several commands share, and training their runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hpccl.cluster.outcome import DONE, INTERRUPTED, STOPPED
from hpccl.cluster.step import in_step
from hpccl.config.load import is_override, sweep
from hpccl.config.unheard import unheard
from hpccl.output import say

if TYPE_CHECKING:
    from hpccl.config.run import RunConfig

__all__ = ["Arguments", "configs_of", "train_all"]

Arguments = Annotated[
    list[str],
    typer.Argument(
        metavar="FILES... [key=value]...",
        help="YAML files, merged from left to right, then settings; key=a,b is a sweep. "
        "Write a file name that contains '=' as ./a=b.yaml.",
    ),
]


def configs_of(arguments: Sequence[str]) -> list[RunConfig]:
    """Return the configuration of each run; print settings without effect on stderr. Raises ConfigError."""
    files = [Path(argument) for argument in arguments if not is_override(argument)]
    overrides = [argument for argument in arguments if is_override(argument)]
    configs = sweep(files, overrides)
    if not in_step():  # there, every rank would print it
        if not files:
            typer.echo(
                "note: no configuration file (such as configs/quickstart.yaml) is given; the defaults apply",
                err=True,
            )
        for line in unheard(configs, overrides):
            typer.echo(f"note: {line}", err=True)
    return configs


def train_all(configs: Sequence[RunConfig]) -> int:
    """Train the runs one after the other; return the exit code. Continue after a failure, but not after a stop.

    In a SLURM step of several ranks, a failure ends the sweep: ranks could continue with different runs.
    """
    from hpccl.cluster.environment import from_slurm
    from hpccl.cluster.local import launch

    argv = ["hpccl", *sys.argv[1:]]
    failed: list[str] = []
    code = DONE
    for number, config in enumerate(configs, start=1):
        if len(configs) > 1:
            say(f"run {number} of {len(configs)}: {config.path}")
        ended = launch(config, argv=argv)
        if ended in (STOPPED, INTERRUPTED):
            if ended == STOPPED and any(Path(config.path, "checkpoints").glob("task-*")):
                say(f"stopped and saved in {config.path}; run the same command again to continue")
            return ended
        if ended == DONE:
            say(f"done: {config.path}")
            continue
        failed.append(config.path)
        code = max(code, ended)
        if number < len(configs) and from_slurm():
            left = len(configs) - number
            say(f"{config.path} failed; the remaining runs ({left}) were not started: fix it or leave it out")
            return code
    if failed and len(configs) > 1:
        say(f"{len(failed)} of {len(configs)} runs failed: {', '.join(failed)}")
    return code
