"""`hpccl curvature show`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hpccl.output import console

__all__ = ["curvature"]

curvature = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Inspect the curvature that a run measured.")


@curvature.callback()
def _curvature_options() -> None:
    """Keep `show` a subcommand while it is the only command."""


@curvature.command("show")
def show_curvature(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.")],
    *,
    task: Annotated[
        int | None, typer.Option(help="The curvature after this task, counted from 0; the newest if not given.")
    ] = None,
    spectra: Annotated[
        bool | None,
        typer.Option(help="Eigenvalues and ranks of all layers, or of none; only the quick ones if not given."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")] = False,
) -> None:
    """Print a run's curvature layer by layer: its size, spectrum, cost and accuracy."""
    from hpccl.report.events import json_text
    from hpccl.tools.curvature_show import read_curvature, render

    shown = read_curvature(run, task=task, spectra=spectra)
    if as_json:
        typer.echo(json_text(shown.as_dict()))
        return
    console().print(render(shown))
