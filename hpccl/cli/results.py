"""`hpccl evaluate`, `report`, `choose`, `export`, `merge` and `doctor`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from hpccl.cluster.outcome import DONE, FAILED
from hpccl.errors import ConfigError, FolderError
from hpccl.folder import RunFolder, refuse_unwritable

__all__ = ["choose", "doctor", "evaluate", "export", "merge", "report"]


def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.")],
    *,
    task: Annotated[
        int | None, typer.Option(help="The state after this task, counted from 0; the newest if not given.")
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(help="Test these in the place of the run's: of hpccl export or merge, or a .safetensors file."),
    ] = None,
    posterior: Annotated[
        Literal["sampled", "probit", "monte_carlo"] | None,
        typer.Option(help="Uncertain weights: draw them, or linearise the network (probit approximation or draws)."),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="With --posterior: draws of weights, or of logits; 32 if not given.")
    ] = None,
    examples: Annotated[
        int | None, typer.Option(help="With --posterior: so many test images; all, or 2000 if linearised.")
    ] = None,
    prior_precision: Annotated[
        float | None, typer.Option(help="With --posterior: that with the largest evidence if not given.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="With --posterior: folder for the files; RUN/uncertainty if not given.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="With --posterior: print JSON instead of a table; otherwise it always is.")
    ] = False,
) -> None:
    """Test a run's checkpoint on all tasks and print the figures as JSON; with --posterior, also how certain it is."""
    if posterior is None:
        from hpccl.train.evaluate_run import evaluate_run

        given = {"--samples": samples, "--examples": examples, "--prior-precision": prior_precision, "--out": out}
        lost = [name for name, value in given.items() if value is not None]
        if lost:
            raise ConfigError(f"{lost[0]} without --posterior: it is about uncertain weights; add --posterior sampled")
        typer.echo(json.dumps(evaluate_run(run, task=task, weights=weights), indent=2))
        return
    from hpccl.report.uncertainty import markdown, summary, write_uncertainty
    from hpccl.train.uncertainty import evaluate_posterior

    if weights is not None:
        raise ConfigError("--weights with --posterior: the posterior is around the run's own weights; give one of them")
    if posterior == "probit" and samples is not None:
        raise ConfigError("--samples with --posterior probit: nothing is drawn; leave it out, or use monte_carlo")
    out = out or run / "uncertainty"
    refuse_unwritable(out, "--out FOLDER")
    found = evaluate_posterior(
        run,
        approximation=posterior,
        task=task,
        samples=32 if samples is None else samples,
        examples=examples,
        prior_precision=prior_precision,
    )
    page = write_uncertainty(found, out)
    typer.echo(json.dumps(summary(found), indent=2, allow_nan=False) if as_json else f"{markdown(found)}\n{page}")


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Folders of runs, and runs.jsonl.xz of earlier comparisons."),
    ],
    *,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the comparison: md, html, csv, json, tex, plots and runs.jsonl.xz.")
    ] = None,
    add: Annotated[bool, typer.Option("--add", help="With the runs of the comparison that OUT has, if any.")] = False,
    begun: Annotated[bool, typer.Option("--begun", help="Leave out folders in which no run was begun.")] = False,
    compare: Annotated[Path | None, typer.Option(help="CSV file of published values to put beside.")] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Which data set of that file, where several could be meant.")
    ] = None,
) -> None:
    """Write report.{json,md,html} in each run's folder, and compare the runs.

    With --out, runs in folders that you may not write are compared, too.
    """
    from hpccl.report.archive import NAME
    from hpccl.report.compare import compare_runs, print_comparison
    from hpccl.report.compare_files import write_comparison
    from hpccl.report.write import report_if_writable

    runs = _begun(runs) if begun else runs
    folders = [path for path in runs if not path.is_file()]
    for folder in folders:
        refused = report_if_writable(folder)
        if refused and out is None:
            raise FolderError(
                f"no report can be written into '{folder}': {refused}; give --out FOLDER, which takes a comparison of "
                "the runs and leaves their folders alone"
            )
        if refused:
            typer.echo(f"{folder}: {refused}: no report is written into it, it is compared all the same", err=True)
    if dataset is not None and compare is None:
        raise ConfigError("--dataset without --compare: it names rows of a file of published values; give both")
    if add and out is None:
        raise ConfigError("--add without --out: it adds to the comparison in that folder; give it, or leave --add out")
    earlier = [out / NAME] if add and out is not None and (out / NAME).exists() else []
    if add and out is not None and not earlier and (out / "comparison.json").exists():
        raise ConfigError(
            f"--add: '{out}' has a comparison, but no {NAME} of its runs, so that they would be lost; give another "
            "--out, or leave --add out to replace it"
        )
    comparison = compare_runs([*earlier, *runs], published=compare, dataset=dataset)
    print_comparison(comparison)
    pages = [write_comparison(comparison, out)] if out is not None else [folder / "report.html" for folder in folders]
    for page in pages:
        typer.echo(str(page))


def _begun(runs: list[Path]) -> list[Path]:
    """Raises FolderError where there are none."""
    absent = [path for path in runs if not path.is_file() and not RunFolder(path).config.is_file()]
    if len(absent) == len(runs):
        raise FolderError(f"--begun: no run was begun in '{absent[0]}' or in any other of {len(absent)} folders")
    for path in absent:
        typer.echo(f"{path}: no run was begun there, it is left out", err=True)
    return [path for path in runs if path not in absent]


def choose(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of finished runs, and runs.jsonl.xz.")],
    *,
    out: Annotated[Path | None, typer.Option(help="Folder for METHOD.yaml files with what was chosen.")] = None,
) -> None:
    """For each method, choose the settings that did best on a validation split (data.validation).

    Judged by the average accuracy over tasks with train.head=own, by that of all classes together with train.head=seen.
    """
    from hpccl.report.choose import choose_runs, write_choices
    from hpccl.report.text import percent

    choices = choose_runs(runs)
    for choice in choices:
        for candidate in choice.candidates:
            settings = " ".join(f"{key}={value}" for key, value in candidate.settings.items()) or "(nothing differs)"
            mark = "*" if candidate is choice.best else " "
            typer.echo(
                f"{mark} {percent(candidate.accuracy)} %  {choice.method}  {settings}  runs: {len(candidate.runs)}"
            )
    for path in write_choices(choices, out) if out is not None else []:
        typer.echo(str(path))


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.")],
    *,
    task: Annotated[
        int | None, typer.Option(help="The network after this task, counted from 0; the newest if not given.")
    ] = None,
    with_curvature: Annotated[
        bool, typer.Option("--curvature", help="Write the run's curvature too, for hpccl merge.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export.")] = False,
) -> None:
    """Write a run's network for timm and others: model.safetensors, config.json and README.md."""
    from hpccl.report.text import size, whole
    from hpccl.train.export import export as write

    done = write(run, out, task=task, curvature=with_curvature, force=force)
    typer.echo(f"{done.folder}: {done.checkpoint}, {whole(done.num_weights)} weights, {size(done.num_bytes)}")


def merge(
    models: Annotated[
        list[Path], typer.Argument(metavar="MODELS...", help="Runs, or folders of `hpccl export --curvature`.")
    ],
    *,
    out: Annotated[Path, typer.Option(help="A new folder, as hpccl export writes it.")],
    base: Annotated[
        Path | None,
        typer.Option(help="What all of them began with: a run, an export or a .safetensors file of weights."),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Of each network, as in 1,0.5,-1; negative removes; 1 each if not given.")
    ] = None,
    method: Annotated[
        Literal["matching", "fisher", "arithmetic", "average"],
        typer.Option(help="Gradient matching by curvature, Fisher averaging, task arithmetic, or the mean."),
    ] = "matching",
    prior_precision: Annotated[
        float, typer.Option(help="Added to the curvature: of the base (matching) or of each network (fisher).")
    ] = 1e-3,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export.")] = False,
) -> None:
    """Merge networks that began with the same weights into one, without data."""
    from hpccl.report.text import percent, whole
    from hpccl.train.merge import merge as write

    scales = None if weights is None else _real_numbers("--weights", weights)
    done = write(models, out, base=base, weights=scales, method=method, prior_precision=prior_precision, force=force)
    known = f", {percent(done.num_measured / done.num_weights)} % by curvature" if done.num_measured else ""
    typer.echo(f"{done.folder}: {len(models)} networks by {method}, {whole(done.num_weights)} weights{known}")
    if done.averaged:
        typer.echo(
            f"running statistics are means, {done.averaged[0]} and others: see {done.folder}/README.md", err=True
        )


def _real_numbers(option: str, text: str) -> list[float]:
    """Parse numbers separated by commas; raise ConfigError."""
    try:
        return [float(each) for each in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"{option} {text}: numbers with commas between them, as in 1,0.5,-1") from error


def doctor(*, as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")] = False) -> None:
    """Look at this machine: what is there, what is missing, what to do. Exit code 1 where training cannot work."""
    from hpccl.doctor import as_dict, diagnose, ready, render

    checks = diagnose()
    if as_json:
        typer.echo(json.dumps(as_dict(checks), indent=2))
    else:
        from rich.console import Console

        Console(width=None if sys.stdout.isatty() else 200).print(render(checks))
    raise typer.Exit(DONE if ready(checks) else FAILED)
