"""`hpccl submit`, `status`, `logs` and `cancel`."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hpccl.cli.common import Arguments, configs_of, train_all
from hpccl.cluster.outcome import DONE, FAILED

if TYPE_CHECKING:
    from hpccl.cluster.submit import Submitted

__all__ = ["cancel", "logs", "status", "submit"]

Runs = Annotated[
    list[Path], typer.Argument(metavar="RUNS...", help="Folders of runs, or of sweeps and campaigns with runs below.")
]

_LISTED = 10  # jobs that `submit` names one by one


def submit(
    arguments: Arguments,
    *,
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait until all runs have ended; exit code 1 if one failed.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the batch script; touch nothing.")] = False,
    dependency: Annotated[
        str | None, typer.Option(help="As for sbatch, e.g. afterok:ID; if that job fails, this one is cancelled.")
    ] = None,
) -> None:
    """Submit runs to the cluster that cluster.* describes and return; a sweep becomes one job array."""
    from hpccl.cluster.submit import check, script
    from hpccl.cluster.submit import submit as hand_over

    configs = configs_of(arguments)
    if dry_run:
        for text in script(configs, dependency=dependency):
            typer.echo(text)
        return
    if all(config.cluster.kind == "inline" for config in configs):
        check(configs, dependency)
        raise typer.Exit(train_all(configs))
    submitted = hand_over(configs, argv=["hpccl", *sys.argv[1:]], dependency=dependency)
    _tell_submitted(submitted)
    if wait:
        from hpccl.cluster.status import wait_for

        raise typer.Exit(wait_for([Path(each.folder) for each in submitted]))


def _tell_submitted(submitted: Sequence[Submitted]) -> None:
    """Print the jobs, and commands to follow or cancel them."""
    for each in submitted[:_LISTED]:
        word = {"slurm": f"job {each.id}", "local": f"process {each.id}", "done": "done already"}[each.kind]
        typer.echo(f"{word}: {each.folder}")
    if len(submitted) > _LISTED:
        typer.echo(f"... and {len(submitted) - _LISTED} more, up to job {submitted[-1].id}: {submitted[-1].folder}")
    folders = [each.folder for each in submitted if each.kind != "done"]
    if folders:
        where, one = _together(folders), shlex.quote(folders[0])
        typer.echo(f"  hpccl status {where}\n  hpccl logs {one} --follow\n  hpccl cancel {where}", err=True)


def _together(folders: Sequence[str]) -> str:
    """Return the folder that holds exactly these runs, or else all their folders; quoted for a shell."""
    from hpccl.cluster.jobs import find_runs

    above = os.path.commonpath([os.path.abspath(folder) for folder in folders])
    if len(folders) > 1 and {os.path.abspath(run) for run in find_runs([Path(above)])} == set(
        map(os.path.abspath, folders)
    ):
        return shlex.quote(above if os.path.isabs(folders[0]) else os.path.relpath(above))
    return shlex.join(folders)


def status(
    runs: Runs,
    *,
    watch: Annotated[
        float | None, typer.Option(min=1.0, metavar="SECONDS", help="Refresh the table until all runs have ended.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")] = False,
) -> None:
    """Show the status of runs: jobs, progress, speed, remaining time and errors."""
    from hpccl.cluster import status_table
    from hpccl.cluster.jobs import refuse_absent

    refuse_absent(runs)
    if watch is None:
        status_table.show(runs, as_json=as_json)
    else:
        status_table.watch(runs, watch, as_json=as_json)


def logs(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.")],
    *,
    rank: Annotated[int, typer.Option(min=0, help="Process whose log is printed.")] = 0,
    lines: Annotated[int, typer.Option(min=0, help="Number of last lines to print; 0: all.")] = 40,
    follow: Annotated[bool, typer.Option("--follow", help="Print new lines until the run has ended.")] = False,
) -> None:
    """Print the log of a run."""
    from hpccl.cluster.logs import print_log

    print_log(run, rank=rank, lines=lines, follow=follow)


def cancel(runs: Runs) -> None:
    """Cancel the jobs of runs, which save first; the folders stay, and the runs can be continued."""
    from hpccl.cluster import cancel as ending
    from hpccl.cluster.jobs import refuse_absent

    refuse_absent(runs)
    lines, well = ending.cancel(runs)
    typer.echo("\n".join(lines))
    raise typer.Exit(DONE if well else FAILED)
