"""`hpccl memory map` and `reconstruct`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from hpccl.errors import ConfigError
from hpccl.folder import refuse_unwritable

__all__ = ["memory"]

memory = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Analyse what a run keeps of past tasks.")


@memory.command("map")
def map_memory(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.")],
    *,
    out: Annotated[Path | None, typer.Option(help="Folder for the files; RUN/memory_map if not given.")] = None,
    task: Annotated[
        int | None, typer.Option(help="The network after this task, counted from 0; the newest if not given.")
    ] = None,
    posterior: Annotated[
        Literal["last_layer", "kronecker", "ekfac", "diagonal", "dense", "checkpoint"],
        typer.Option(help="Over the last layer's weights, or over all: measured anew, or the run's own curvature."),
    ] = "last_layer",
    examples: Annotated[
        int | None, typer.Option(help="Size of a uniform sample; all, or 2000 if the posterior is over all weights.")
    ] = None,
    fraction: Annotated[
        float | None, typer.Option(help="Share of the data for the curvature of all weights; all if not given.")
    ] = None,
    prior_precision: Annotated[
        float | None, typer.Option(help="The value with the largest evidence if not given.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON, for machines.")] = False,
) -> None:
    """Write the memory map of a run: how much its network depends on each example and class."""
    from hpccl.report.memory_map import summary, write_memory_map
    from hpccl.tools.memory_map.build import map_memory as find

    out = out or run / "memory_map"
    refuse_unwritable(out, "--out FOLDER")
    found = find(
        run,
        task=task,
        posterior=posterior,
        examples=examples,
        fraction=fraction,
        prior_precision=prior_precision,
    )
    page = write_memory_map(found, out)
    typer.echo(json.dumps(summary(found), indent=2, allow_nan=False) if as_json else str(page))


@memory.command("reconstruct")
def reconstruct_memory(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.")],
    *,
    sizes: Annotated[str, typer.Option(help="Examples kept of each task, as in 50,100.")] = "50,100,200",
    selectors: Annotated[
        str | None,
        typer.Option(
            help="Kinds of memory.selector, as in uniform,gini+sampled,reconstruction+fitted; if not given, all kinds "
            "that look at one task, without variants."
        ),
    ] = None,
    task: Annotated[
        int | None, typer.Option(help="Select after this task, counted from 0; the last with a next task if not given.")
    ] = None,
    points: Annotated[int, typer.Option(help="Points on the path to the weights after the next task.")] = 5,
    past: Annotated[
        float | None,
        typer.Option(help="Share of past data for the true gradient; log.reconstruction, or 1, if not given."),
    ] = None,
    fraction: Annotated[
        float, typer.Option(help="Share of the data outside each memory to measure curvature on; 0: the run's own.")
    ] = 0.0,
    out: Annotated[Path | None, typer.Option(help="Folder for the files; RUN/reconstruction if not given.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON, for machines.")] = False,
) -> None:
    """Measure how well each selector's memory reconstructs the gradient of past tasks on the path to the next task."""
    from hpccl.config.memory import SELECTORS
    from hpccl.report.reconstruction import markdown, write_reconstruction
    from hpccl.tools.memory_reconstruct import reconstruct_memory as find

    out = out or run / "reconstruction"
    refuse_unwritable(out, "--out FOLDER")
    found = find(
        run,
        sizes=_numbers(sizes),
        selectors=SELECTORS if selectors is None else [each.strip() for each in selectors.split(",") if each.strip()],
        task=task,
        points=points,
        past=past,
        fraction=fraction,
    )
    page = write_reconstruction(found, out)
    typer.echo(json.dumps(found.as_dict(), indent=2, allow_nan=False) if as_json else f"{markdown(found)}\n{page}")


def _numbers(text: str) -> list[int]:
    """Parse whole numbers separated by commas; raise ConfigError."""
    try:
        return [int(each) for each in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"--sizes {text}: give whole numbers separated by commas, as in 50,100") from error
