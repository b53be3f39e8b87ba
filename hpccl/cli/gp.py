"""`hpccl gp fit`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

__all__ = ["gp"]

gp = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Gaussian processes on a run's network features.")


@gp.callback()
def _gp_options() -> None:
    """Keep `fit` a subcommand while it is the only command."""


@gp.command("fit")
def fit_gp(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.")],
    *,
    task: Annotated[
        int | None, typer.Option(help="The network after this task, counted from 0; the newest if not given.")
    ] = None,
    kernel: Annotated[Literal["rbf", "matern52", "linear"], typer.Option(help="Kernel of the process.")] = "rbf",
    lengthscale: Annotated[
        float | None, typer.Option(help="Initial lengthscale; the typical distance of features if not given.")
    ] = None,
    variance: Annotated[float, typer.Option(help="Initial variance of the kernel.")] = 10.0,
    inducing: Annotated[int, typer.Option(help="Maximum number of inducing inputs.")] = 200,
    keep: Annotated[int, typer.Option(help="Examples kept of each task.")] = 50,
    steps: Annotated[int, typer.Option(help="Update steps of the sites at each task.")] = 20,
    rate: Annotated[float, typer.Option(help="Largest step size of the sites, above 0 and at most 1.")] = 0.5,
    tune: Annotated[int, typer.Option(help="Hyperparameter steps on the evidence at each task.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for the files; RUN/gp if not given.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON, for machines.")] = False,
) -> None:
    """Learn the tasks of a run with a Gaussian process on its network's features, keeping a few examples of each."""
    from hpccl.gp.state import Settings
    from hpccl.tools.gp_fit import fit_gp as find
    from hpccl.tools.gp_fit import markdown, refuse_out, write_gp

    refuse_out(out or run / "gp")
    settings = Settings(inducing=inducing, steps=steps, rate=rate, memory=keep, tune=tune)
    found = find(run, settings=settings, task=task, kernel=kernel, lengthscale=lengthscale, variance=variance)
    folder = write_gp(found, out or run / "gp")
    typer.echo(json.dumps(found.as_dict(), indent=2, allow_nan=False) if as_json else f"{markdown(found)}\n{folder}")
