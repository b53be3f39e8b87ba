"""`hpccl train`, `adapt`, `extend`, `check` and `plan`."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hpccl.cli.common import Arguments, configs_of, train_all
from hpccl.cluster.outcome import DONE
from hpccl.cluster.step import end, first_of_step, in_step
from hpccl.config.adapt import SETTINGS, adapted_config, named, reference_config
from hpccl.config.extend import SETTINGS as OF_NEW_TASKS
from hpccl.config.load import dump, is_override
from hpccl.errors import ConfigError
from hpccl.folder import expanded
from hpccl.output import console

if TYPE_CHECKING:
    from hpccl.config.run import RunConfig

__all__ = ["adapt", "check", "extend", "plan", "train"]

_MUCH = 0.05  # loss of accuracy in an adaptation that is worth a note


def train(
    arguments: Arguments,
    *,
    nproc: Annotated[int | None, typer.Option(help="Processes; the same as cluster.nproc=N.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress; the same as log.quiet=true.")] = False,
) -> None:
    """Train, or continue a run that was stopped. The runs of a sweep are trained one after the other."""
    options = [f"cluster.nproc={nproc}"] if nproc is not None else []
    options += ["log.quiet=true"] if quiet else []
    code = train_all(configs_of([*arguments, *options]))
    if in_step():
        end(code)
    raise typer.Exit(code)


def adapt(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of the run whose network is adapted.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[key=value]...",
            help=f"Settings that override the run's: {SETTINGS}.",
        ),
    ] = None,
    *,
    out: Annotated[Path, typer.Option(help="A new folder, or that of an interrupted adaptation.")],
    add: Annotated[
        list[str] | None, typer.Option(metavar="SHARDS", help="Learn further images of known classes; may be repeated.")
    ] = None,
    remove: Annotated[
        str | None, typer.Option(metavar="NAMES", help="Forget classes or ids: a,b,... or a file with one per line.")
    ] = None,
    prior_precision: Annotated[
        float | None, typer.Option(help="Another prior.normal.precision of the weights; at least 0.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="KIND", help="Another network: model.kind; settings of model follow as key=value."),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            help="What to compare with: `retrain` trains anew in OUT/reference; or the folder of a retrained run."
        ),
    ] = None,
    nproc: Annotated[int | None, typer.Option(help="Processes; the same as cluster.nproc=N.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress; the same as log.quiet=true.")] = False,
) -> None:
    """Adapt a trained network to more data, less data, another prior or architecture. Run it again to continue."""
    options = [f"cluster.nproc={nproc}"] if nproc is not None else []
    options += ["log.quiet=true"] if quiet else []
    change = _change(add, None if remove is None else named(remove), prior_precision, model)
    _refuse_files(settings or [], "an adaptation")
    from hpccl.train.adapt import check_adaptation, last_mark

    given: dict[str, Any] = {
        "task": last_mark(run).task,
        "change": change,
        "model": model,
        "settings": [*(settings or []), *options],
    }
    out = expanded("--out", str(out))
    config, other = adapted_config(run, out, **given), None
    check_adaptation(config)
    if reference is not None:
        folder = out / "reference" if reference == "retrain" else expanded("--reference", reference)
        other = reference_config(run, folder, **given)
    runs = [config, other] if other is not None and reference == "retrain" else [config]
    _refuse_folders(runs, None if reference == "retrain" else other)
    code = train_all(runs)
    if code == DONE and first_of_step():
        _compare(out, other)
    if in_step():
        end(code)
    raise typer.Exit(code)


def _refuse_folders(runs: Sequence[RunConfig], reference: RunConfig | None) -> None:
    """Check, before training, that folders are free and that a given reference is one for this adaptation."""
    from hpccl.cluster.prepare import refuse_another
    from hpccl.tools.adapt_compare import check_reference

    if not in_step():  # there, one task may take over a folder while others check it
        for config in runs:
            refuse_another(config)
    if reference is not None:
        check_reference(reference)


def _compare(out: Path, reference: RunConfig | None) -> None:
    from hpccl.report.adaptation import markdown, write_adaptation
    from hpccl.tools.adapt_compare import compare_adaptation

    found = compare_adaptation(out, reference)
    page = write_adaptation(found, out)
    typer.echo(f"{markdown(found)}\n\n{page}")
    if note := loss_of_what_stays(found.start.accuracy_kept, found.adapted.accuracy_kept):
        typer.echo(f"note: {note}", err=True)


def loss_of_what_stays(before: float | None, after: float | None) -> str | None:
    """Return a note on the loss, from accuracies in [0, 1]; None if it is small or was not measured."""
    from hpccl.report.text import percent

    if before is None or after is None or after >= before - _MUCH:
        return None
    return (
        f"the accuracy on the classes that stay fell from {percent(before)} to {percent(after)} %: adapt again, into "
        "another --out, with fewer train.epochs or a smaller optim.lr"
    )


def _change(
    add: list[str] | None, remove: list[str] | None, precision: float | None, model: str | None
) -> dict[str, Any]:
    """Return section `adapt` from the options; raise ConfigError unless exactly one is given, with a valid value."""
    if precision is not None and not (math.isfinite(precision) and precision >= 0):
        raise ConfigError(
            f"--prior-precision is {precision:g}; allowed: a finite number >= 0, in nats per squared weight (0: no "
            "prior)"
        )
    given: dict[str, dict[str, Any] | None] = {
        "--add": None if not add else {"kind": "add", "data": add},
        "--remove": None if remove is None else {"kind": "remove", "names": remove},
        "--prior-precision": None if precision is None else {"kind": "precision", "precision": precision},
        "--model": None if model is None else {"kind": "model"},
    }
    found = {option: change for option, change in given.items() if change is not None}
    if len(found) != 1:
        said = ", ".join(found) or "none of them"
        raise ConfigError(f"{said} given; give exactly one of {', '.join(given)}, and adapt again for another")
    return next(iter(found.values()))


def _refuse_files(settings: Sequence[str], what: str) -> None:
    files = [setting for setting in settings if not is_override(setting)]
    if files:
        raise ConfigError(f"'{files[0]}' is not key=value; {what} takes its configuration from the run's folder")


def extend(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run, which stays as it is.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[key=value]...", help=f"Settings of the extended run: {OF_NEW_TASKS}."),
    ] = None,
    *,
    out: Annotated[Path, typer.Option(help="A new folder, that of the extended run.")],
    part: Annotated[
        list[str],
        typer.Option(
            metavar="SHARDS",
            help="Shards of new tasks, as in stream.parts: a path, or '{path: PATH, tasks: 2}'; may be repeated.",
        ),
    ],
) -> None:
    """Add tasks with new classes to a finished run; train the new run folder to learn them."""
    _refuse_files(settings or [], "an extended run")
    from hpccl.cluster.prepare import prepare
    from hpccl.tools.extend import extend as write

    done = write(run, expanded("--out", str(out)), parts=part, settings=settings or [])
    folder = prepare(done.config, ["hpccl", *sys.argv[1:]])
    command = "submit" if done.config.cluster.kind == "slurm" else "train"
    typer.echo(
        f"{folder.path}: the run with {done.tasks} more {'task' if done.tasks == 1 else 'tasks'} and {done.classes} "
        f"more classes; to learn them: hpccl {command} {shlex.quote(str(folder.config))}"
    )


def check(arguments: Arguments) -> None:
    """Validate a configuration and print all of it; touch nothing. A sweep prints one document for each run."""
    configs = configs_of(arguments)
    typer.echo("---\n".join(f"# method: {config.method}\n{dump(config)}" for config in configs), nl=False)


def plan(
    arguments: Arguments,
    *,
    nodes: Annotated[int | None, typer.Option(min=1, help="Machines; cluster.nodes if not given.")] = None,
    nproc: Annotated[int | None, typer.Option(min=1, help="Processes on each; cluster.nproc if not given.")] = None,
    bandwidth: Annotated[
        float | None, typer.Option(help="Bandwidth from one process to others, in gigabytes per second.")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Time a micro-batch on this machine; takes seconds.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")] = False,
) -> None:
    """Predict a run's memory, communication and time on any number of processes, without training."""
    configs = configs_of(arguments)
    from hpccl.report.events import json_text
    from hpccl.tools.plan.build import make_plan
    from hpccl.tools.plan.show import render

    if bandwidth is not None and not (math.isfinite(bandwidth) and bandwidth > 0):
        raise ConfigError(f"--bandwidth is {bandwidth:g}; allowed: a finite number of gigabytes per second above 0")
    plans = [
        make_plan(
            config,
            nodes=nodes or config.cluster.nodes,
            nproc=nproc or config.cluster.nproc,
            measured=measure,
            gigabytes_per_second=bandwidth,
        )
        for config in configs
    ]
    if as_json:
        found = [each.as_dict() for each in plans]
        typer.echo(json_text(found[0] if len(found) == 1 else found))
        return
    for each in plans:
        console().print(render(each))
