"""`hpccl evaluate`, `report`, `choose`, `export`, `merge` and `doctor`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from hpccl.cluster.outcome import DONE, FAILED
from hpccl.errors import ConfigError, FolderError
from hpccl.folder import RunFolder, refuse_unwritable
from hpccl.output import console

__all__ = ["choose", "doctor", "evaluate", "export", "merge", "report"]


def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.")],
    *,
    task: Annotated[
        int | None, typer.Option(help="The state after this task, counted from 0; the newest if not given.")
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(help="Test these instead of the run's: from hpccl export or merge, or a .safetensors file."),
    ] = None,
    posterior: Annotated[
        Literal["sampled", "probit", "monte_carlo"] | None,
        typer.Option(help="Predict with uncertain weights: sample them, or linearise the network (probit or draws)."),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="With --posterior: number of draws of weights or logits; 32 if not given.")
    ] = None,
    examples: Annotated[
        int | None, typer.Option(help="With --posterior: number of test images; all, or 2000 if linearised.")
    ] = None,
    prior_precision: Annotated[
        float | None, typer.Option(help="With --posterior: the value with the largest evidence if not given.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="With --posterior: folder for the files; RUN/uncertainty if not given.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="With --posterior: print JSON instead of a table. Without: always JSON.")
    ] = False,
) -> None:
    """Test a run's checkpoint on all tasks and print the figures as JSON; with --posterior, also how certain it is."""
    if posterior is None:
        from hpccl.report.events import json_text
        from hpccl.tools.evaluate_run import evaluate_run

        given = {"--samples": samples, "--examples": examples, "--prior-precision": prior_precision, "--out": out}
        lost = [name for name, value in given.items() if value is not None]
        if lost:
            raise ConfigError(f"{lost[0]} needs --posterior; add --posterior sampled, or leave {lost[0]} out")
        typer.echo(json_text(evaluate_run(run, task=task, weights=weights)))
        return
    from hpccl.report.uncertainty import markdown, summary, write_uncertainty
    from hpccl.tools.uncertainty import evaluate_posterior

    if weights is not None:
        raise ConfigError(
            "--weights with --posterior: the posterior is around the run's own weights; leave one of them out"
        )
    if posterior == "probit" and samples is not None:
        raise ConfigError(
            "--samples with --posterior probit has no effect; leave it out, or use --posterior monte_carlo"
        )
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
    add: Annotated[bool, typer.Option("--add", help="Include the runs of the comparison in OUT, if any.")] = False,
    begun: Annotated[bool, typer.Option("--begun", help="Leave out folders in which no run was started.")] = False,
    compare: Annotated[Path | None, typer.Option(help="CSV file of published values to compare with.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Data set of that file, if several fit the runs.")] = None,
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
                f"no report can be written into '{folder}': {refused}; give --out FOLDER to write a comparison of "
                "the runs there only"
            )
        if refused:
            typer.echo(f"{folder}: {refused}: no report is written there, but the run is compared", err=True)
    if dataset is not None and compare is None:
        raise ConfigError("--dataset needs --compare, the file of published values that has this data set; give both")
    if add and out is None:
        raise ConfigError("--add needs --out, the folder of the comparison to add to; give both, or leave --add out")
    earlier = [out / NAME] if add and out is not None and (out / NAME).exists() else []
    if add and out is not None and not earlier and (out / "comparison.json").exists():
        raise ConfigError(
            f"--add: the comparison in '{out}' has no {NAME}, so that its runs would be lost; give another "
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
        raise FolderError(f"--begun: no run was started in any of the {len(absent)} folders, such as '{absent[0]}'")
    for path in absent:
        typer.echo(f"{path}: no run was started there; it is left out", err=True)
    return [path for path in runs if path not in absent]


def choose(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of finished runs, and runs.jsonl.xz.")],
    *,
    out: Annotated[Path | None, typer.Option(help="Folder for METHOD.yaml files with the chosen settings.")] = None,
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
    from hpccl.tools.export import export as write

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
        typer.Option(help="The weights that all of them started from: a run, an export or a .safetensors file."),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(help="Weight of each network, as in 1,0.5,-1; negative removes it; 1 each if not given."),
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
    """Merge networks that started from the same weights into one, without data."""
    from hpccl.report.text import percent, whole
    from hpccl.tools.merge import merge as write

    scales = None if weights is None else _real_numbers("--weights", weights)
    done = write(models, out, base=base, weights=scales, method=method, prior_precision=prior_precision, force=force)
    known = f", {percent(done.num_measured / done.num_weights)} % by curvature" if done.num_measured else ""
    typer.echo(f"{done.folder}: {len(models)} networks by {method}, {whole(done.num_weights)} weights{known}")
    if done.averaged:
        typer.echo(
            f"running statistics ({done.averaged[0]} and others) are averaged: see {done.folder}/README.md", err=True
        )


def _real_numbers(option: str, text: str) -> list[float]:
    """Parse numbers separated by commas; raise ConfigError."""
    try:
        return [float(each) for each in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"{option} {text}: give numbers separated by commas, as in 1,0.5,-1") from error


def doctor(*, as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")] = False) -> None:
    """Check this machine: what is there, what is missing, what to do. Exit code 1 if training cannot work."""
    from hpccl.doctor import as_dict, diagnose, ready, render

    checks = diagnose()
    if as_json:
        typer.echo(json.dumps(as_dict(checks), indent=2))
    else:
        console().print(render(checks))
    raise typer.Exit(DONE if ready(checks) else FAILED)
