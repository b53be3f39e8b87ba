"""One task of a SLURM job step: a rank with a log of its own, whose exit code says whether to start the job again.

The script that started the step queues the job again where that can help (hpccl/cluster/requeue.sh). It sees one exit
code, the highest of all ranks, and when a rank fails SLURM kills the others, which gives 137 or 143. So a rank that met
an error which the next start would meet again adds 200 to its code.
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
from hpccl.machine import SlurmJob, slurm_job
from hpccl.output import flush, say
from hpccl.report.standing import read_standing

__all__ = ["end", "fail_step", "in_step", "refuse_standstill", "run_step"]

_HIGHEST = 200  # added to the codes of failures, which are then above those of killed ranks
_OUTPUTS = (1, 2)  # also of libraries and children
_STARTS = "starts.jsonl"  # in the folder of logs
_STANDSTILLS = 5  # starts of a job at one place in the run; the next one is refused
_runs = itertools.count()  # of a sweep in this process: all ranks count the same ones


def in_step() -> bool:
    """Whether this process is a task that SLURM started to be a rank: one of several, or named so (HPCCL_STEP)."""
    alone = os.environ.get("HPCCL_STEP") == "1" and "SLURM_STEP_ID" in os.environ and "RANK" not in os.environ
    return alone or bool(from_slurm())


def run_step(config: RunConfig, argv: Sequence[str], *, leader_log: bool = False) -> int:
    """Train as the rank that SLURM's variables name (alone, where they name none), with the run folder prepared.

    Args:
        config: what to run.
        argv: the command, for the record.
        leader_log: rank 0 writes to `logs/rank-0.txt` too, and not to where SLURM puts the output of a step.

    Returns:
        As `worker.main`, with 75 also where another rank was lost: the same job may be started again.
    """
    # Before anything starts a thread or a process, which inherit this: SLURM signals all processes of a step.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGUSR2})
    signal.signal(signal.SIGCONT, signal.SIG_IGN)  # SLURM sends it before each SIGTERM, and submitit would print a line
    named = _named(next(_runs))
    former = {name: os.environ.get(name) for name in named}
    os.environ.update(named)
    rank = int(os.environ.get("RANK", "0"))
    folder, job = RunFolder(Path(config.path)), slurm_job() or SlurmJob("none", 0)
    threads = config.cluster.threads or int(os.environ.get("SLURM_CPUS_PER_TASK", "0"))
    if threads:
        os.environ["OMP_NUM_THREADS"] = str(threads)

    def report(error: HpcclError) -> int:
        sys.stderr.write(f"error: rank {rank}: {error}\n")
        sys.stderr.flush()
        if isinstance(error, WorldError):
            if rank == 0:
                with contextlib.suppress(OSError):
                    _remember(folder, {"job": job.id, "restart": job.restart, "reason": str(error)})
            return STOPPED  # the cause is elsewhere, and may be a broken machine
        _note(folder, job, rank, type(error).__name__, str(error))
        return code_of(error)

    try:
        with _own_log(folder, rank) if rank or leader_log else contextlib.nullcontext():
            sys.stderr.write(f"-- job {job.id}, restart {job.restart}, rank {rank} on {os.uname().nodename}\n")
            if rank == 0:
                refuse_standstill(folder, job)
            from hpccl.cluster import worker

            return worker.main(config, argv, report=report)
    except HpcclError as error:
        return report(error)
    except Exception as error:  # noqa: BLE001 - the end of the process: whatever it is, it is told and not repeated
        traceback.print_exc()
        _note(folder, job, rank, "crash", "".join(traceback.format_exception(error)))
        return FAILED
    finally:
        for name, value in former.items():  # the next run of a sweep reads them anew
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _named(run: int) -> dict[str, str]:
    """What SLURM's variables say of this rank, with a port of its own for each run of a sweep.

    Ranks end a run at different moments: on the same port, one would meet what another one still has of the last run.
    """
    named = from_slurm()
    if named:
        named["MASTER_PORT"] = str(int(named["MASTER_PORT"]) + run)
    return named


def fail_step(folder: RunFolder, error: HpcclError) -> int:
    """Tell of an error from before the run began, which the next start would meet again; the exit code."""
    rank = int(os.environ.get("SLURM_PROCID", "0"))
    say(f"error: rank {rank}: {error}")
    _note(folder, slurm_job() or SlurmJob("none", 0), rank, type(error).__name__, str(error))
    return code_of(error)


def end(code: int) -> NoReturn:
    """End this task, without the interpreter's teardown, in which communication threads may abort."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # srun sends it when a partner ended first; the code is to be ours
    flush()
    os._exit(code + _HIGHEST if code in (FAILED, WRONG_CONFIG) else code)


def _note(folder: RunFolder, job: SlurmJob, rank: int, kind: str, message: str) -> None:
    """Write down what another start would meet again, for `hpccl status`."""
    found: dict[str, Any] = {"job": job.id, "restart": job.restart, "rank": rank, "kind": kind, "message": message}
    with contextlib.suppress(FolderError, OSError), replacing(folder.error) as beside:
        beside.write_text(json.dumps({**found, "time": time.time()}), encoding="utf-8")


@contextlib.contextmanager
def _own_log(folder: RunFolder, rank: int) -> Iterator[None]:
    """Send what this process and its children print to `logs/rank-N.txt`, after what earlier starts wrote.

    Raises:
        FolderError: it cannot be written.
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
    """Have standard output and error go to open files."""
    flush()
    for target, number in zip(targets, _OUTPUTS, strict=True):
        os.dup2(target, number)


def refuse_standstill(folder: RunFolder, job: SlurmJob) -> None:
    """Note this start, and refuse it where the last ones of the same job all began at the same place.

    Raises:
        FolderError: the job was queued again and again without learning anything.
    """
    if read_standing(folder.events).turn == "done":
        return  # as each start of a sweep in one step finds the runs before the one that goes on
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
            f"job {job.id} was started {len(starts)} times and the last {_STANDSTILLS} starts all stood at {place}; "
            f"{cause} mend that and submit the run again"
        )
    _remember(folder, {"job": job.id, "restart": job.restart, "place": place})


def _remember(folder: RunFolder, line: dict[str, Any]) -> None:
    """Add to what is known of the starts of jobs: where each began, and what another rank ended it with."""
    path = folder.logs / _STARTS
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def _remembered(path: Path) -> list[dict[str, Any]]:
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found
