"""`hpccl memory map` and `reconstruct`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from hpccl.errors import ConfigError
from hpccl.folder import refuse_unwritable

__all__ = ["memory"]

memory = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look at what a run keeps of its past.")


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
        typer.Option(help="Of the last layer's weights, or of all: measured anew, or the run's own curvature."),
    ] = "last_layer",
    examples: Annotated[
        int | None, typer.Option(help="A uniform sample of so many; all, or 2000 where all weights count.")
    ] = None,
    fraction: Annotated[
        float | None, typer.Option(help="Share of the data that gives the curvature of all weights; all if not given.")
    ] = None,
    prior_precision: Annotated[
        float | None, typer.Option(help="Of the posterior; that with the largest evidence if not given.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON, for machines.")] = False,
) -> None:
    """Write the memory map of a run: what its training examples are worth, what each class and the memory hold."""
    from hpccl.report.memory_map import summary, write_memory_map
    from hpccl.train.memory_map.build import map_memory as find

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
        int | None, typer.Option(help="Choose after this task, counted from 0; the last with a next one if not given.")
    ] = None,
    points: Annotated[int, typer.Option(help="On the way to the weights after the next task.")] = 5,
    past: Annotated[
        float | None, typer.Option(help="Share of the past that gives the true gradient; as log.reconstruction, or 1.")
    ] = None,
    fraction: Annotated[
        float, typer.Option(help="Measure curvature anew, without each memory, on so much of the rest; 0: the run's.")
    ] = 0.0,
    out: Annotated[Path | None, typer.Option(help="Folder for the files; RUN/reconstruction if not given.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON, for machines.")] = False,
) -> None:
    """How well each selector's memory would have reconstructed the gradient of the past on the way to the next task."""
    from hpccl.config.memory import SELECTORS
    from hpccl.report.reconstruction import markdown, write_reconstruction
    from hpccl.train.memory_reconstruct import reconstruct_memory as find

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
        raise ConfigError(f"--sizes {text}: whole numbers with commas between them, as in 50,100") from error
