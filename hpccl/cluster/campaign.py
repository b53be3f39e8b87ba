"""Campaigns: `hpccl` commands that depend on each other, executed on this machine or queued on a cluster.

A campaign is a list of steps. Finished runs are not repeated, so a campaign can be started again at any time.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING

from hpccl.cluster.outcome import ASKED_TO_STOP, DONE, FAILED, INTERRUPTED, STOPPED, tell
from hpccl.cluster.signals import handled
from hpccl.cluster.worker import die_with_parent
from hpccl.config.load import is_override, points, sweep
from hpccl.config.machine import SlurmCluster
from hpccl.config.run import RunConfig
from hpccl.errors import ConfigError, FolderError, HpcclError
from hpccl.folder import explain_os_error
from hpccl.machine import usable_cores, visible_gpus
from hpccl.output import discard, say

if TYPE_CHECKING:
    from hpccl.cluster.submit import Submitted

__all__ = ["Campaign", "Step", "at_least_one", "carry_out", "options"]


@dataclass(frozen=True)
class Step:
    """One `hpccl` command.

    arguments: those of `hpccl`, such as ("train", "a.yaml", "seed=0,1")
    after: names of the steps that must succeed first; a report only waits for their end, and leaves out runs that were
        not begun
    """

    name: str
    arguments: tuple[str, ...]
    after: tuple[str, ...] = ()

    @property
    def reports(self) -> bool:
        """Whether it compares runs, which it does with those that there are."""
        return self.arguments[0] == "report"


@dataclass(frozen=True)
class Campaign:
    """Steps, in an order in which they may run.

    folder: for the steps' output, and for the files of jobs that do not train
    """

    folder: Path
    steps: tuple[Step, ...]

    def __post_init__(self) -> None:
        """Raise ConfigError if a name occurs twice, or if a step waits for one that does not come before it."""
        seen: set[str] = set()
        for step in self.steps:
            unknown = sorted(set(step.after) - seen)
            if step.name in seen or unknown:
                what = (
                    f"waits for {', '.join(unknown)}, which does not come before it"
                    if unknown
                    else "occurs twice; give each value once"
                )
                raise ConfigError(f"step '{step.name}' of the campaign {what}")
            seen.add(step.name)


def at_least_one(text: str) -> int:
    """Return the number of an option's value that counts something.

    Raises:
        ArgumentTypeError: it is no whole number above 0.
    """
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text}; allowed: whole numbers above 0")
    return int(text)


def options(description: str | None) -> argparse.ArgumentParser:
    """Return the parser of the command line that campaigns share, for `carry_out`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cluster", choices=("local", "slurm"), default="local", help="where to run (default: local, this machine)"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="local: number of commands run at the same time (1)"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands only")
    parser.add_argument(
        "--add", action="store_true", help="reports: include the runs of earlier reports in their folders"
    )
    parser.add_argument(
        "--with",
        dest="more",
        nargs="+",
        default=[],
        metavar="FILE|key=value",
        help="further files and settings for every training, such as configs/cluster/slurm_gpu.yaml",
    )
    return parser


def carry_out(make: Callable[[], Campaign], chosen: argparse.Namespace) -> int:
    """Run or queue all steps; return the exit code.

    Args:
        make: returns the steps, or raises an HpcclError where the command line's values cannot be.
        chosen: the options that the parser of `options` returned.
    """
    try:
        campaign = make()
        steps = [_with(step, chosen.more, add=chosen.add) for step in campaign.steps]
        if chosen.add and not any(step.reports for step in steps):
            raise ConfigError("--add has no effect, as this campaign writes no report; leave it out")
        _refuse_sweeps(chosen.more)
        _tell_overruled(campaign.steps, chosen.more)
        if chosen.jobs < 1:
            raise ConfigError(f"--jobs is {chosen.jobs}; allowed: at least 1")
        if chosen.dry_run:
            return _list(steps)
        if chosen.cluster == "slurm":
            return _queue(campaign, steps, chosen.more)
        return _Local(campaign.folder, steps, chosen.jobs).run()
    except HpcclError as error:
        return tell(error)


def _with(step: Step, more: Sequence[str], *, add: bool) -> Step:
    """Add the options --with and --add to a step; files come before settings, as the command expects."""
    if step.reports and add:
        return Step(step.name, (*step.arguments, "--add"), step.after)
    if step.arguments[0] != "train":
        return step
    given = step.arguments[1:]
    files = [each for each in given if not is_override(each)] + [each for each in more if not is_override(each)]
    settings = [each for each in more if is_override(each)] + [each for each in given if is_override(each)]
    return Step(step.name, ("train", *files, *settings), step.after)


def _refuse_sweeps(more: Sequence[str]) -> None:
    """Raise ConfigError if settings for all trainings make a sweep: other steps need one run in a step's folder."""
    axes = points([each for each in more if is_override(each)])[0]
    if axes:
        key = next(iter(axes))
        raise ConfigError(
            f"--with {key}=A,B is a sweep, but a campaign's other steps need one run a training; give one value (a "
            f"list is {key}=[A, B]), or use launch/sweep.py"
        )


def _tell_overruled(steps: Sequence[Step], more: Sequence[str]) -> None:
    """Print which settings for all trainings have no effect, as the trainings set them, too."""
    for setting in filter(is_override, more):
        key = setting.partition("=")[0]
        own = {step.name: each for step in steps for each in step.arguments[1:] if each.startswith(f"{key}=")}
        if own:
            name, each = next(iter(own.items()))
            say(f"note: --with {setting} has no effect in {len(own)} steps, such as '{name}', which sets {each}")


def _of_begun(step: Step) -> Step:
    """A report of the runs that were begun, where others may have failed before that; any other step as it is."""
    return Step(step.name, (*step.arguments, "--begun"), step.after) if step.reports else step


def _list(steps: Sequence[Step]) -> int:
    """Print the commands; the reader may close the pipe early, as `head` does."""
    try:
        for step in steps:
            print(_shown(step))
        sys.stdout.flush()
    except BrokenPipeError:
        discard(sys.stdout)
    return DONE


def _shown(step: Step) -> str:
    return f"+ {shlex.join(['hpccl', *step.arguments])}"


# ---------------------------------------------------------------- on a cluster


def _queue(campaign: Campaign, steps: Sequence[Step], more: Sequence[str]) -> int:
    """Submit each step as a job or array that waits for those of the steps in `after`."""
    from hpccl.cluster.submit import submit, submit_command

    trained = {step.name: _for_slurm(step) for step in steps if step.arguments[0] == "train"}
    jobs: dict[str, list[str]] = {}
    cluster = _cluster(steps, more)
    for step in steps:
        waits = [number for name in step.after for number in jobs[name]]
        dependency = f"{'afterany' if step.reports else 'afterok'}:{':'.join(waits)}" if waits else None
        if step.name in trained:
            submitted = submit(
                trained[step.name], argv=["hpccl", *step.arguments], dependency=dependency, keep_live=True
            )
            jobs[step.name] = _numbers(submitted)
            here = [each.folder for each in submitted if each.kind == "local"]
            if here:
                raise FolderError(f"'{here[0]}' is being trained on this machine; run `hpccl cancel {here[0]}` first")
        else:
            number = submit_command(
                _of_begun(step).arguments,
                cluster,
                name=step.name,
                folder=campaign.folder / "slurm" / step.name,
                dependency=dependency,
                awaited=any(step.name in other.after for other in steps),
            )
            jobs[step.name] = [number]
        say(f"{', '.join(jobs[step.name]) or 'done already'}: {_shown(step)}", sys.stdout)
    say(f"all steps are queued; follow them with `hpccl status {campaign.folder}`", sys.stdout)
    return DONE


def _for_slurm(step: Step) -> list[RunConfig]:
    """Return the runs of a training step.

    Raises:
        ConfigError: the cluster of one is not SLURM: it would be trained here, on a login node.
    """
    configs = _configs(step.arguments[1:])
    for config in configs:
        if config.cluster.kind != "slurm":
            raise ConfigError(
                f"--cluster slurm queues trainings, but '{step.name}' has cluster.kind={config.cluster.kind}; give "
                "--with configs/cluster/slurm_gpu.yaml, another file with SLURM settings, or cluster.kind=slurm"
            )
    return configs


def _numbers(submitted: Sequence[Submitted]) -> list[str]:
    """Return the jobs to wait for: new arrays as a whole, but kept tasks singly, as others may have failed."""
    return list(dict.fromkeys(each.id if each.kept else each.id.partition("_")[0] for each in submitted if each.id))


def _configs(arguments: Sequence[str]) -> list[RunConfig]:
    files = [Path(argument) for argument in arguments if not is_override(argument)]
    return sweep(files, [argument for argument in arguments if is_override(argument)])


def _cluster(steps: Sequence[Step], more: Sequence[str]) -> SlurmCluster:
    """Return the cluster for steps that do not train: the first training's, or that of `--with` if there is none."""
    trained = next((step.arguments[1:] for step in steps if step.arguments[0] == "train"), None)
    of_cluster = [each for each in more if not is_override(each) or each.startswith("cluster")]
    config = _configs(["cluster.kind=slurm", *(of_cluster if trained is None else trained)])[0]
    assert isinstance(config.cluster, SlurmCluster), "a kind that is given counts"
    return config.cluster


# ---------------------------------------------------------------- on this machine


@dataclass
class _Local:
    """Runs at most `limit` commands at the same time; steps that wait for a failed one are not run.

    gpus: those of this machine; trainings of one process that run at the same time share them out
    """

    folder: Path
    steps: Sequence[Step]
    limit: int
    gpus: Sequence[str] = field(default_factory=visible_gpus)
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    given: dict[str, str] = field(default_factory=dict)
    codes: dict[str, int] = field(default_factory=dict)
    asked: list[int] = field(default_factory=list)

    def run(self) -> int:
        with self._passing_on():
            waiting = list(self.steps)
            while waiting or self.running:
                waiting = self._begin(waiting)
                self._collect()
                time.sleep(0.05)
        return _worst(self.codes)

    def _begin(self, waiting: Sequence[Step]) -> list[Step]:
        left = []
        for step in waiting:
            codes = [self.codes.get(name) for name in step.after]
            failed = any(code not in (None, DONE) for code in codes)
            if self.asked or (failed and not step.reports):
                self.codes[step.name] = STOPPED if self.asked else FAILED
            elif len(self.running) < self.limit and None not in codes:
                process = self.running[step.name] = self._start(_of_begun(step) if failed else step)
                if self.asked and process.poll() is None:  # it may have missed the signal
                    process.send_signal(signal.SIGTERM)
            else:
                left.append(step)
        return left

    def _start(self, step: Step) -> subprocess.Popen[bytes]:
        """Start a step; if several may run at once, its output goes to a file of its own."""
        output: IO[bytes] | None = None
        if self.limit > 1:
            log = self.folder / "logs" / f"{step.name}.txt"
            try:
                log.parent.mkdir(parents=True, exist_ok=True)
                output = log.open("ab")
            except OSError as error:
                raise FolderError(f"'{log}' cannot be written: {explain_os_error(error)}") from error
        where = f" > {output.name}" if output is not None else ""
        say(f"{_shown(step)}{where}", sys.stdout)
        threads = {"OMP_NUM_THREADS": str(max(1, usable_cores() // self.limit))} if self.limit > 1 else {}
        command = [sys.executable, "-m", "hpccl.cli", *step.arguments]
        orphaned = functools.partial(die_with_parent, os.getpid(), signal.SIGTERM)  # it saves, and frees its folder
        with output or contextlib.nullcontext():
            return subprocess.Popen(
                command,
                env={**threads, **os.environ, **self._own_gpu(step)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=orphaned,  # noqa: PLW1509 - this process has no threads
            )

    def _own_gpu(self, step: Step) -> dict[str, str]:
        """Return the variable that shows a training of one process the GPU that the fewest others use."""
        if self.limit == 1 or len(self.gpus) < 2 or not _is_one_process(step):
            return {}
        used = [self.given[name] for name in self.running if name in self.given]
        self.given[step.name] = min(self.gpus, key=used.count)
        return {"CUDA_VISIBLE_DEVICES": self.given[step.name]}

    def _collect(self) -> None:
        for name, process in list(self.running.items()):
            code = process.poll()
            if code is not None:
                unheard = self.asked and code == -signal.SIGTERM  # killed before its signal handlers were set
                self.codes[name] = STOPPED if unheard else code if code >= 0 else 128 - code
                del self.running[name]
                if self.limit > 1:
                    say(f"{name}: {'done' if code == DONE else f'exit code {code}'}", sys.stdout)

    @contextlib.contextmanager
    def _passing_on(self) -> Iterator[None]:
        """Pass signals on to all running commands, which save and stop; they do so, too, when the terminal is gone."""

        def pass_on(number: int, _frame: object) -> None:
            self.asked.append(number)
            for process in self.running.values():
                if process.poll() is None:
                    process.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)

        hung_up = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]  # nohup ignores it
        with handled((*ASKED_TO_STOP, *hung_up), pass_on):
            yield


def _is_one_process(step: Step) -> bool:
    """Whether a step is a training in one process."""
    if step.arguments[0] != "train":
        return False
    try:
        return all(config.cluster.nproc == 1 for config in _configs(step.arguments[1:]))
    except ConfigError:  # the command itself will say so
        return False


def _worst(codes: Mapping[str, int]) -> int:
    """Print which steps did not succeed; return the overall exit code."""
    failed = [name for name, code in codes.items() if code not in (DONE, STOPPED, INTERRUPTED)]
    if failed:
        sys.stderr.write(f"{len(failed)} of {len(codes)} steps failed or could not begin: {', '.join(failed)}\n")
        return max(codes[name] for name in failed)
    if any(code != DONE for code in codes.values()):
        sys.stderr.write("stopped and saved; start the same campaign again to continue\n")
        return STOPPED
    return DONE
