"""The command `hpccl`: parse, call, print. torch is imported only by what needs it."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

import hpccl
from hpccl.cli_shards import shards
from hpccl.cluster.outcome import DONE, FAILED, INTERRUPTED, STOPPED, tell
from hpccl.cluster.step import end, in_step
from hpccl.config.load import dump, is_override, sweep
from hpccl.errors import ConfigError, HpcclError

if TYPE_CHECKING:
    from hpccl.cluster.submit import Submitted
    from hpccl.config.run import RunConfig

__all__ = ["app", "main"]

app = typer.Typer(
    name="hpccl",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Continual learning of image classifiers on a stream of tasks.",
)
app.add_typer(shards, name="shards")
curvature = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look at what a run measured of its past.")
app.add_typer(curvature, name="curvature")
memory = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look at what a run keeps of its past.")
app.add_typer(memory, name="memory")
gp = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Gaussian processes on what a run's network sees.")
app.add_typer(gp, name="gp")

_LISTED = 10  # jobs that `submit` names one by one

Arguments = Annotated[
    list[str],
    typer.Argument(
        metavar="FILES... [key=value]...",
        help="YAML files, merged from left to right, then settings; key=a,b is a sweep. "
        "A file whose name holds '=' is written ./a=b.yaml.",
    ),
]


def main() -> None:
    """Run the command and exit.

    Exit codes: 0 done; 1 failed; 2 wrong command or configuration; 75 stopped and saved, the same command continues;
    130 stopped by Ctrl-C.
    """
    try:
        app()
    except HpcclError as error:
        sys.exit(tell(error))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hpccl {hpccl.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    *,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


# ---------------------------------------------------------------- runs


@app.command()
def train(
    arguments: Arguments,
    *,
    nproc: Annotated[int | None, typer.Option(help="Processes; the same as cluster.nproc=N.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress; the same as log.quiet=true.")] = False,
) -> None:
    """Train, or continue a run that was stopped. A sweep runs one after the other."""
    options = [f"cluster.nproc={nproc}"] if nproc is not None else []
    options += ["log.quiet=true"] if quiet else []
    code = _train_all(_configs([*arguments, *options]))
    if in_step():
        end(code)
    raise typer.Exit(code)


def _configs(arguments: Sequence[str]) -> list[RunConfig]:
    """Raises ConfigError."""
    files = [Path(argument) for argument in arguments if not is_override(argument)]
    return sweep(files, [argument for argument in arguments if is_override(argument)])


def _train_all(configs: Sequence[RunConfig]) -> int:
    """Run each; a failure does not keep the others from running, a wish to stop does."""
    from hpccl.cluster.local import launch

    argv = ["hpccl", *sys.argv[1:]]
    failed: list[str] = []
    code = DONE
    for number, config in enumerate(configs, start=1):
        if len(configs) > 1:
            typer.echo(f"run {number} of {len(configs)}: {config.path}", err=True)
        ended = launch(config, argv=argv)
        if ended in (STOPPED, INTERRUPTED):
            if ended == STOPPED:
                typer.echo(f"stopped and saved in {config.path}; run the same command again to continue", err=True)
            return ended
        if ended == DONE:
            typer.echo(f"done: {config.path}", err=True)
            continue
        failed.append(config.path)
        code = max(code, ended)
    if failed and len(configs) > 1:
        typer.echo(f"{len(failed)} of {len(configs)} runs failed: {', '.join(failed)}", err=True)
    return code


@app.command()
def adapt(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of the run whose network is adapted.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[key=value]...",
            help="Over the run's: of train, optim, engine, cluster, checkpoint, log; prior.weight.",
        ),
    ] = None,
    *,
    out: Annotated[Path, typer.Option(help="A new folder, or that of an interrupted adaptation.")],
    add: Annotated[
        list[str] | None, typer.Option(metavar="SHARDS", help="Learn further images of known classes; may be repeated.")
    ] = None,
    remove: Annotated[
        str | None, typer.Option(metavar="NAMES", help="Forget classes or ids: a,b,... or a file with one a line.")
    ] = None,
    prior_precision: Annotated[
        float | None, typer.Option(min=0.0, help="Another prior.normal.precision of the weights.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="KIND", help="Another network: model.kind; settings of model follow as key=value."),
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="`retrain` to train anew in OUT/reference, or a run's folder, to compare with.")
    ] = None,
    nproc: Annotated[int | None, typer.Option(help="Processes; the same as cluster.nproc=N.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress; the same as log.quiet=true.")] = False,
) -> None:
    """Adapt a trained network to more data, less data, another prior or another architecture. Again: it continues."""
    from hpccl.config.adapt import adapted_config, named, reference_config

    options = [f"cluster.nproc={nproc}"] if nproc is not None else []
    options += ["log.quiet=true"] if quiet else []
    change = _change(add, None if remove is None else named(remove), prior_precision, model)
    _refuse_files(settings or [])
    from hpccl.train.adapt import check_adaptation, last_mark

    given: dict[str, Any] = {
        "task": last_mark(run).task,
        "change": change,
        "model": model,
        "settings": [*(settings or []), *options],
    }
    config = adapted_config(run, out, **given)
    check_adaptation(config)
    runs = [config]
    if reference == "retrain":
        runs.append(reference_config(run, out / "reference", **given))
    code = _train_all(runs)
    if in_step():
        end(code)
    if code == DONE:
        from hpccl.report.adaptation import markdown, write_adaptation
        from hpccl.train.adapt_compare import compare_adaptation

        other = out / "reference" if reference == "retrain" else None if reference is None else Path(reference)
        found = compare_adaptation(out, other)
        page = write_adaptation(found, out)
        typer.echo(f"{markdown(found)}\n\n{page}")
    raise typer.Exit(code)


def _change(
    add: list[str] | None, remove: list[str] | None, precision: float | None, model: str | None
) -> dict[str, Any]:
    """Section adapt, as far as the options say it; ConfigError unless exactly one of them is given."""
    given: dict[str, dict[str, Any] | None] = {
        "--add": None if not add else {"kind": "add", "data": add},
        "--remove": None if remove is None else {"kind": "remove", "names": remove},
        "--prior-precision": None if precision is None else {"kind": "precision", "precision": precision},
        "--model": None if model is None else {"kind": "model"},
    }
    found = {option: change for option, change in given.items() if change is not None}
    if len(found) != 1:
        said = ", ".join(found) or "none of them"
        raise ConfigError(f"{said} given; an adaptation is one of {', '.join(given)}, one after the other for several")
    return next(iter(found.values()))


def _refuse_files(settings: Sequence[str]) -> None:
    files = [setting for setting in settings if not is_override(setting)]
    if files:
        raise ConfigError(f"'{files[0]}' is no key=value; an adaptation takes its configuration from the run's folder")


@app.command()
def submit(
    arguments: Arguments,
    *,
    wait: Annotated[
        bool, typer.Option("--wait", help="Return when all have ended; exit code 1 if one failed.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the batch script; touch nothing.")] = False,
    dependency: Annotated[
        str | None, typer.Option(help="As of sbatch: afterok:ID and the like; a failed one cancels this.")
    ] = None,
) -> None:
    """Hand runs to the cluster that cluster.* describes and return; a sweep becomes one job array."""
    from hpccl.cluster.submit import check, script
    from hpccl.cluster.submit import submit as hand_over

    configs = _configs(arguments)
    if dry_run:
        for text in script(configs, dependency=dependency):
            typer.echo(text)
        return
    if all(config.cluster.kind == "inline" for config in configs):
        check(configs, dependency)
        raise typer.Exit(_train_all(configs))
    submitted = hand_over(configs, argv=["hpccl", *sys.argv[1:]], dependency=dependency)
    _tell_submitted(submitted)
    if wait:
        from hpccl.cluster.status import wait_for

        raise typer.Exit(wait_for([Path(each.folder) for each in submitted]))


def _tell_submitted(submitted: Sequence[Submitted]) -> None:
    """Which jobs there are now, and what to do next."""
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
    """The folder that holds these runs and no other, or all of their folders; as words of a shell."""
    from hpccl.cluster.jobs import find_runs

    above = os.path.commonpath([os.path.abspath(folder) for folder in folders])
    if len(folders) > 1 and {os.path.abspath(run) for run in find_runs([Path(above)])} == set(
        map(os.path.abspath, folders)
    ):
        return shlex.quote(above if os.path.isabs(folders[0]) else os.path.relpath(above))
    return shlex.join(folders)


Runs = Annotated[
    list[Path], typer.Argument(metavar="RUNS...", help="Folders of runs, or of sweeps and campaigns with runs below.")
]


@app.command()
def status(
    runs: Runs,
    *,
    watch: Annotated[
        float | None, typer.Option(min=1.0, metavar="SECONDS", help="Look again and again until all have ended.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")] = False,
) -> None:
    """Show what runs do: their jobs, where they stand, how fast, how long still, what went wrong."""
    from hpccl.cluster import status_table

    if watch is None:
        status_table.show(runs, as_json=as_json)
    else:
        status_table.watch(runs, watch, as_json=as_json)


@app.command()
def logs(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.")],
    *,
    rank: Annotated[int, typer.Option(min=0, help="Of which process.")] = 0,
    lines: Annotated[int, typer.Option(min=0, help="How many of the last lines; 0 is all.")] = 40,
    follow: Annotated[bool, typer.Option("--follow", help="Go on until the run has ended.")] = False,
) -> None:
    """Print what a run printed."""
    from hpccl.cluster.logs import print_log

    print_log(run, rank=rank, lines=lines, follow=follow)


@app.command()
def cancel(runs: Runs) -> None:
    """End the jobs of runs, which save first; the folders stay, and can be continued."""
    from hpccl.cluster import cancel as ending

    lines, well = ending.cancel(runs)
    typer.echo("\n".join(lines))
    raise typer.Exit(DONE if well else FAILED)


@app.command()
def check(arguments: Arguments) -> None:
    """Validate a configuration and print all of it; touch nothing. A sweep prints one document for each run."""
    configs = _configs(arguments)
    typer.echo("---\n".join(dump(config) for config in configs), nl=False)


@app.command()
def plan(
    arguments: Arguments,
    *,
    nodes: Annotated[int | None, typer.Option(min=1, help="Machines; as cluster.* says.")] = None,
    nproc: Annotated[int | None, typer.Option(min=1, help="Processes on each; as cluster.* says.")] = None,
    bandwidth: Annotated[
        float | None, typer.Option(help="What a process can send to others, in gigabytes a second.")
    ] = None,
    measure: Annotated[
        bool, typer.Option("--measure/--no-measure", help="Time a micro-batch on this machine, for seconds.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")] = False,
) -> None:
    """Predict what a run will hold, send and spend on a world of processes, without training."""
    configs = _configs(arguments)
    from hpccl.train.plan.build import make_plan
    from hpccl.train.plan.show import render

    if bandwidth is not None and bandwidth <= 0:
        raise ConfigError(f"--bandwidth is {bandwidth:g}; it must be above 0")
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
        typer.echo(json.dumps(found[0] if len(found) == 1 else found, indent=2))
        return
    from rich.console import Console

    for each in plans:
        Console(width=None if sys.stdout.isatty() else 200).print(render(each))


@app.command()
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
    samples: Annotated[int, typer.Option(help="With --posterior: draws of weights, or of logits.")] = 32,
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

        given = {"--examples": examples, "--prior-precision": prior_precision, "--out": out}
        lost = [name for name, value in given.items() if value is not None]
        if lost:
            raise ConfigError(f"{lost[0]} without --posterior: it is about uncertain weights; add --posterior sampled")
        typer.echo(json.dumps(evaluate_run(run, task=task, weights=weights), indent=2))
        return
    from hpccl.report.uncertainty import markdown, summary, write_uncertainty
    from hpccl.train.uncertainty import evaluate_posterior

    if weights is not None:
        raise ConfigError("--weights with --posterior: the posterior is around the run's own weights; give one of them")
    found = evaluate_posterior(
        run,
        approximation=posterior,
        task=task,
        samples=samples,
        examples=examples,
        prior_precision=prior_precision,
    )
    page = write_uncertainty(found, out or run / "uncertainty")
    typer.echo(json.dumps(summary(found), indent=2, allow_nan=False) if as_json else f"{markdown(found)}\n{page}")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs.")],
    *,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the comparison: md, html, csv, json, tex and plots.")
    ] = None,
    compare: Annotated[Path | None, typer.Option(help="CSV file of published values to put beside.")] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Which data set of that file, where several could be meant.")
    ] = None,
) -> None:
    """Write report.{json,md,html} in each run's folder, and compare the runs."""
    from hpccl.report.compare import compare_runs, print_comparison
    from hpccl.report.compare_files import write_comparison
    from hpccl.report.write import report_run

    for folder in runs:
        report_run(folder)
    comparison = compare_runs(runs, published=compare, dataset=dataset)
    print_comparison(comparison)
    pages = [write_comparison(comparison, out)] if out is not None else [folder / "report.html" for folder in runs]
    for page in pages:
        typer.echo(str(page))


@app.command()
def choose(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of finished runs.")],
    *,
    out: Annotated[Path | None, typer.Option(help="Folder for METHOD.yaml files with what was chosen.")] = None,
) -> None:
    """For each method, choose the settings that did best on a validation split (data.validation)."""
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


@app.command()
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


@app.command()
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
    """Raises ConfigError."""
    try:
        return [float(each) for each in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"{option} {text}: numbers with commas between them, as in 1,0.5,-1") from error


@app.command()
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


# ---------------------------------------------------------------- curvature


@curvature.callback()
def _curvature_options() -> None:
    """Keeps `show` a word of its own while it is the only command."""


@curvature.command("show")
def show_curvature(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.")],
    *,
    task: Annotated[
        int | None, typer.Option(help="The curvature after this task, counted from 0; the newest if not given.")
    ] = None,
    spectra: Annotated[
        bool | None,
        typer.Option(help="Eigenvalues and ranks of all layers, or of none; if not given, of those that are quick."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")] = False,
) -> None:
    """Print a run's curvature layer by layer: its size, its spectrum, what it takes and how exact it is."""
    from hpccl.train.curvature_show import read_curvature, render

    shown = read_curvature(run, task=task, spectra=spectra)
    if as_json:
        typer.echo(json.dumps(shown.as_dict(), indent=2))
        return
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 200).print(render(shown))


# ---------------------------------------------------------------- memory


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
    fraction: Annotated[float, typer.Option(help="Share of the data that gives the curvature of all weights.")] = 1.0,
    prior_precision: Annotated[
        float | None, typer.Option(help="Of the posterior; that with the largest evidence if not given.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON, for machines.")] = False,
) -> None:
    """Write the memory map of a run: what its training examples are worth, what each class and the memory hold."""
    from hpccl.report.memory_map import summary, write_memory_map
    from hpccl.train.memory_map.build import map_memory as find

    found = find(
        run,
        task=task,
        posterior=posterior,
        examples=examples,
        fraction=fraction,
        prior_precision=prior_precision,
    )
    page = write_memory_map(found, out or run / "memory_map")
    typer.echo(json.dumps(summary(found), indent=2, allow_nan=False) if as_json else str(page))


@memory.command("reconstruct")
def reconstruct_memory(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.")],
    *,
    sizes: Annotated[str, typer.Option(help="Examples kept of each task, as in 50,100.")] = "50,100,200",
    selectors: Annotated[
        str | None, typer.Option(help="Kinds of memory.selector, as in uniform,gini+sampled; all if not given.")
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

    found = find(
        run,
        sizes=_numbers(sizes),
        selectors=SELECTORS if selectors is None else selectors.split(","),
        task=task,
        points=points,
        past=past,
        fraction=fraction,
    )
    page = write_reconstruction(found, out or run / "reconstruction")
    typer.echo(json.dumps(found.as_dict(), indent=2, allow_nan=False) if as_json else f"{markdown(found)}\n{page}")


def _numbers(text: str) -> list[int]:
    """Raises ConfigError."""
    try:
        return [int(each) for each in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"--sizes {text}: whole numbers with commas between them, as in 50,100") from error


# ---------------------------------------------------------------- Gaussian processes


@gp.callback()
def _gp_options() -> None:
    """Keeps `fit` a word of its own while it is the only command."""


@gp.command("fit")
def fit_gp(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder.")],
    *,
    task: Annotated[
        int | None, typer.Option(help="The network after this task, counted from 0; the newest if not given.")
    ] = None,
    kernel: Annotated[Literal["rbf", "matern52", "linear"], typer.Option(help="Of the process.")] = "rbf",
    lengthscale: Annotated[
        float | None, typer.Option(help="To begin with; the typical distance of features if not given.")
    ] = None,
    variance: Annotated[float, typer.Option(help="Of the kernel, to begin with.")] = 10.0,
    inducing: Annotated[int, typer.Option(help="Most inducing inputs.")] = 200,
    keep: Annotated[int, typer.Option(help="Examples of a task that are kept.")] = 50,
    steps: Annotated[int, typer.Option(help="Of the sites of a task.")] = 20,
    rate: Annotated[float, typer.Option(help="Longest step of the sites, above 0 and at most 1.")] = 0.5,
    tune: Annotated[int, typer.Option(help="Steps of hyperparameters by the evidence, at each task.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for the files; RUN/gp if not given.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON, for machines.")] = False,
) -> None:
    """Learn the tasks of a run with a Gaussian process on its network's features, keeping a few examples of each."""
    from hpccl.gp.stream import Settings
    from hpccl.train.gp_fit import fit_gp as find
    from hpccl.train.gp_fit import markdown, write_gp

    settings = Settings(inducing=inducing, steps=steps, rate=rate, memory=keep, tune=tune)
    found = find(run, settings=settings, task=task, kernel=kernel, lengthscale=lengthscale, variance=variance)
    folder = write_gp(found, out or run / "gp")
    typer.echo(json.dumps(found.as_dict(), indent=2, allow_nan=False) if as_json else f"{markdown(found)}\n{folder}")


if __name__ == "__main__":
    main()
