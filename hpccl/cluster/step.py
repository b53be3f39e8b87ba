"""One task of a SLURM job step: a rank with its own log, whose exit code decides whether the job is requeued.

The script that started the step requeues the job if that can help (hpccl/cluster/requeue.sh). It sees one exit code,
the highest of all ranks, and when a rank fails SLURM kills the others, which gives 137 or 143. So a rank with an error
that would recur in the next start adds 200 to its code.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from hpccl.cluster.environment import from_slurm
from hpccl.cluster.outcome import FAILED, STOPPED, WRONG_CONFIG, code_of
from hpccl.config.run import RunConfig
from hpccl.errors import FolderError, HpcclError, WorldError
from hpccl.folder import RunFolder, explain_os_error, replacing
from hpccl.machine import SlurmJob, slurm_job, variable
from hpccl.output import flush, say
from hpccl.report.standing import read_standing

__all__ = ["end", "fail_step", "first_of_step", "in_step", "refuse_standstill", "run_step"]

_HIGHEST = 200  # added to exit codes of failures, to exceed those of killed ranks
_OUTPUTS = (1, 2)  # file descriptors, so that output of libraries and children is redirected too
_STARTS = "starts.jsonl"  # in the folder of logs; the starts of SLURM jobs
_OTHERS = 5.0  # seconds by which tasks of a step may start later than others
_STANDSTILLS = 5  # starts of a job from the same checkpoint; the next one is refused
_runs = itertools.count()  # counts the runs of a sweep in this process; the same on all ranks


def in_step() -> bool:
    """Whether SLURM started this process as a rank: as one of several tasks, or with HPCCL_STEP=1."""
    alone = os.environ.get("HPCCL_STEP") == "1" and "SLURM_STEP_ID" in os.environ and "RANK" not in os.environ
    return alone or bool(from_slurm())


def first_of_step() -> bool:
    """Whether this process is no rank of a step, or its first."""
    return not in_step() or os.environ.get("SLURM_PROCID", "0") == "0"


def run_step(config: RunConfig, argv: Sequence[str], *, leader_log: bool = False) -> int:
    """Train as the rank of SLURM's variables (alone, if they give none); the run folder must be prepared.

    Args:
        config: the run.
        argv: the command, for the record.
        leader_log: rank 0 also writes to its log, `logs/rank-0.txt`, instead of to the step's output.

    Returns:
        As `worker.main`, with 75 also if another rank was lost: the same job may be started again.
    """
    # Before any thread or process starts, as they inherit the mask: SLURM signals all processes of a step.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGUSR2})
    signal.signal(signal.SIGCONT, signal.SIG_IGN)  # SLURM sends it before each SIGTERM, and submitit would print a line
    number = next(_runs)
    if number > 0:  # the previous run of the sweep left it ignored
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    named = _named(number)
    former = {name: os.environ.get(name) for name in named}
    os.environ.update(named)
    rank = int(os.environ.get("RANK", "0"))
    folder, job = RunFolder(Path(config.path)), slurm_job() or SlurmJob("none", 0)
    threads = config.cluster.threads or variable("OMP_NUM_THREADS") or variable("SLURM_CPUS_PER_TASK")
    if threads:
        os.environ["OMP_NUM_THREADS"] = str(threads)

    def report(error: HpcclError) -> int:
        sys.stderr.write(f"error: rank {rank}: {error}\n")
        sys.stderr.flush()
        if isinstance(error, WorldError):
            if rank == 0:
                with contextlib.suppress(FolderError):
                    _remember(folder, {"job": job.id, "restart": job.restart, "reason": str(error)})
            return STOPPED  # the cause is elsewhere, such as a broken machine
        _note(folder, job, rank, type(error).__name__, str(error))
        return code_of(error)

    try:
        with _own_log(folder, rank) if rank or leader_log else contextlib.nullcontext():
            sys.stderr.write(f"-- job {job.id}, restart {job.restart}, rank {rank} on {os.uname().nodename}\n")
            if rank == 0:
                refuse_standstill(folder, job)
            from hpccl.cluster import worker

            # srun sends SIGTERM when another rank has ended: until this process ends, too, keep its exit code.
            return worker.main(config, argv, report=report, deaf_afterwards=True)
    except HpcclError as error:
        return report(error)
    except Exception as error:  # noqa: BLE001 - the end of the process: any error is reported, and not retried
        traceback.print_exc()
        _note(folder, job, rank, "crash", "".join(traceback.format_exception(error)))
        return FAILED
    finally:
        for name, value in former.items():  # the next run of a sweep sets them again
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _named(run: int) -> dict[str, str]:
    """Return torch.distributed's variables for this rank, with a different port for each run of a sweep.

    Ranks end a run at different moments: on the same port, one might connect to the previous run's store.
    """
    named = from_slurm()
    if named:
        named["MASTER_PORT"] = str(int(named["MASTER_PORT"]) + run)
    return named


def fail_step(folder: RunFolder, error: HpcclError) -> int:
    """Report an error from before the run began, which would recur at the next start; return the exit code."""
    rank = int(os.environ.get("SLURM_PROCID", "0"))
    say(f"error: rank {rank}: {error}")
    _note(folder, slurm_job() or SlurmJob("none", 0), rank, type(error).__name__, str(error))
    return code_of(error)


def end(code: int) -> NoReturn:
    """End this process without the interpreter's teardown, in which communication threads may abort."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # as after a run, also where none began
    flush()
    if code == WRONG_CONFIG and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        time.sleep(_OTHERS)  # the other tasks find the same mistake; ended while they start, their 143 would hide it
    os._exit(code + _HIGHEST if code in (FAILED, WRONG_CONFIG) else code)


def _note(folder: RunFolder, job: SlurmJob, rank: int, kind: str, message: str) -> None:
    """Write an error that would recur at the next start to the error file, for `hpccl status`."""
    found: dict[str, Any] = {"job": job.id, "restart": job.restart, "rank": rank, "kind": kind, "message": message}
    with contextlib.suppress(FolderError, OSError), replacing(folder.error) as beside:
        beside.write_text(json.dumps({**found, "time": time.time()}), encoding="utf-8")


@contextlib.contextmanager
def _own_log(folder: RunFolder, rank: int) -> Iterator[None]:
    """Redirect the output of this process and its children to `logs/rank-N.txt`, after that of earlier starts.

    Raises:
        FolderError: the log cannot be written.
    """
    path = folder.logs / f"rank-{rank}.txt"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        log = path.open("ab")
    except OSError as error:
        raise FolderError(f"'{path}' cannot be written: {explain_os_error(error)}") from error
    kept = [os.dup(number) for number in _OUTPUTS]
    try:
        _redirect([log.fileno(), log.fileno()])
        yield
    finally:
        _redirect(kept)
        for number in kept:
            os.close(number)
        log.close()


def _redirect(targets: Sequence[int]) -> None:
    """Redirect standard output and error to open file descriptors."""
    flush()
    for target, number in zip(targets, _OUTPUTS, strict=True):
        os.dup2(target, number)


def refuse_standstill(folder: RunFolder, job: SlurmJob) -> None:
    """Record this start, and refuse it if the last ones of the same job all began at the same checkpoint.

    Raises:
        FolderError: the job was requeued repeatedly without learning anything, or the start cannot be recorded.
    """
    if read_standing(folder.events).turn == "done":
        return  # each start of a sweep in one step passes its finished runs
    from hpccl.checkpoint.store import latest  # loads torch

    found = latest(folder.checkpoints)
    place = found.name if found is not None else "the beginning"
    lines = [line for line in _remembered(folder.logs / _STARTS) if line.get("job") == job.id]
    starts = [line["place"] for line in lines if "place" in line]
    if len(starts) >= _STANDSTILLS and set(starts[-_STANDSTILLS:]) == {place}:
        reason = lines[-1].get("reason")
        cause = (
            f"the last one ended with: {reason};"
            if reason
            else "is its time limit (cluster.time) too short to load the data and train a few steps, or its memory "
            "(cluster.mem) too small?"
        )
        raise FolderError(
            f"job {job.id} was started {len(starts)} times and the last {_STANDSTILLS} starts all began at {place}; "
            f"{cause} fix that and submit the run again"
        )
    _remember(folder, {"job": job.id, "restart": job.restart, "place": place})


def _remember(folder: RunFolder, line: dict[str, Any]) -> None:
    """Append a line on a start of a job: where it began, or the error of a lost rank that ended it.

    Raises:
        FolderError: it cannot be written.
    """
    path = folder.logs / _STARTS
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    except OSError as error:
        raise FolderError(f"'{path}' cannot be written: {explain_os_error(error)}") from error


def _remembered(path: Path) -> list[dict[str, Any]]:
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found
