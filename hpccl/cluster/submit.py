"""Submit runs to a cluster: check them here, on the login node and without torch, then queue a job or an array."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hpccl.cluster import background
from hpccl.cluster.job import CommandJob, TrainJob
from hpccl.cluster.prepare import prepare, refuse_another
from hpccl.cluster.queue import cancel, states
from hpccl.cluster.records import JobRecord, birth, read_records, write_record
from hpccl.cluster.slurm import parameters, python_command, seconds
from hpccl.config.engine import Fsdp2Engine, shards_of
from hpccl.config.first_task import first_task_folder
from hpccl.config.machine import SlurmCluster
from hpccl.config.run import RunConfig
from hpccl.config.stream import FewShotScenario, PermutedScenario, RotatedScenario, ShardStream
from hpccl.errors import ConfigError, DataError, FolderError, WorldError
from hpccl.folder import RunFolder, expanded
from hpccl.output import say
from hpccl.report.events import read_events

if TYPE_CHECKING:
    from submitit import SlurmExecutor

    from hpccl.data.shards.manifest import Manifest

__all__ = ["Submitted", "script", "submit", "submit_command"]

_START_UP = 60  # seconds between a job's start and its first step, at the least


@dataclass(frozen=True)
class Submitted:
    """Where a run was submitted.

    kind: `done`: it had finished already and is not run again
    id: the job's or process's number; empty for `done`
    kept: it was queued or running before
    """

    folder: str
    kind: Literal["slurm", "local", "done"]
    id: str = ""
    kept: bool = False


def submit(
    configs: Sequence[RunConfig], *, argv: Sequence[str], dependency: str | None = None, keep_live: bool = False
) -> list[Submitted]:
    """Queue all runs and return at once; runs that are done are left out, and a sweep becomes one job array.

    Args:
        configs: runs for `slurm`; others run one after the other in the background of this machine.
        argv: the command, for the record.
        dependency: as for `sbatch --dependency`; SLURM only. Files are not checked, since earlier jobs may make them.
        keep_live: a run that is queued or running already stays so, instead of being an error.

    Raises:
        ConfigError: a configuration is not possible, or the cluster has no such partition.
        DataError: shards or a file of weights are missing.
        FolderError: a folder holds another run, or its run is queued or running already.
        WorldError: this machine has no SLURM or submitit, or SLURM refused.
    """
    check(configs, dependency)
    todo = [config for config in configs if not _is_done(config)]
    live = _live(todo)
    if live and not keep_live:
        path, (there, word) = next(iter(live.items()))
        raise FolderError(
            f"run '{path}' already has {'job' if there.kind == 'slurm' else 'process'} {there.id} ({word}); wait "
            f"for it (hpccl status {shlex.quote(path)}) or end it (hpccl cancel {shlex.quote(path)}) first"
        )
    found = {config.path: Submitted(config.path, "done") for config in configs}
    found |= {path: Submitted(path, there.kind, there.id, kept=True) for path, (there, _) in live.items()}
    todo = [config for config in todo if config.path not in live]
    folders = {config.path: prepare(config, argv) for config in todo}
    for cluster, group in _by_cluster(todo):
        runs = [folders[config.path] for config in group]
        if isinstance(cluster, SlurmCluster):
            jobs: list[Any] = [TrainJob(str(run.path), tuple(argv)) for run in runs]
            name, folder = group[0].name, _submission_folder(runs)
            try:
                ids = _queue(jobs, cluster, name=name, folder=folder, dependency=dependency)
            except WorldError as error:
                before = [each.id for each in found.values() if each.kind == "slurm" and not each.kept]
                raise WorldError(
                    f"{error}; queued before that: {', '.join(before)}" if before else str(error)
                ) from error
            for run, number in zip(runs, ids, strict=True):
                log = folder.absolute() / f"{number}_0_log.out"
                write_record(run, JobRecord("slurm", number, time.time(), os.uname().nodename, log=str(log)))
                found[str(run.path)] = Submitted(str(run.path), "slurm", number)
        else:
            log = runs[0].logs.absolute() / "background.txt"
            pid = background.start(runs, argv, log)
            record = JobRecord("local", str(pid), time.time(), os.uname().nodename, born=birth(pid), log=str(log))
            for run in runs:
                write_record(run, record)
                found[str(run.path)] = Submitted(str(run.path), "local", str(pid))
    return list(found.values())


def script(configs: Sequence[RunConfig], *, dependency: str | None = None) -> Iterator[str]:
    """Yield the batch script of each job that `submit` would make; writes nothing, and needs no SLURM.

    Raises:
        ConfigError: see `submit`; or a cluster is not SLURM.
    """
    _check_words(configs)
    for cluster, group in _by_cluster(configs):
        if not isinstance(cluster, SlurmCluster):
            raise ConfigError(f"cluster.kind = {cluster.kind}: only SLURM has batch scripts; set cluster.kind=slurm")
        folder = _submission_folder([RunFolder(Path(config.path)) for config in group])
        yield _text(cluster, group[0].name, folder, dependency, count=len(group))


def submit_command(
    arguments: Sequence[str],
    cluster: SlurmCluster,
    *,
    name: str,
    folder: Path,
    dependency: str | None = None,
    awaited: bool = False,
) -> str:
    """Queue another hpccl command, such as `report`, as a job of one process without GPUs; return its number.

    If the last one from the same folder is queued or running already, it stays and nothing is queued; but if its words
    or what it waits for differ, and no job waits for it (`awaited`), the new one replaces it if it has not begun. Those
    that run end first, as they write to the same place.

    Raises:
        ConfigError: the dependency is malformed, or the cluster has no such partition.
        WorldError: this machine has no SLURM or submitit, or SLURM refused.
    """
    _check_site([cluster])
    record, command = RunFolder(folder), shlex.join(arguments)
    live = list(_alive({each.id: each for each in read_records(record)}).values())  # the last is the newest
    if live and (awaited or (live[-1][0].command, live[-1][0].dependency) == (command, dependency or "")):
        return live[-1][0].id
    replaced = [there.id for there, word in live if word == "PENDING"]
    if replaced and (problem := cancel(replaced)):
        raise WorldError(f"job {', '.join(replaced)} is to be replaced, but: {problem}")
    running = [f"afterany:{there.id}" for there, word in live if word != "PENDING"]
    after = ",".join([*([dependency] if dependency else []), *running]) or None
    single = cluster.model_copy(update={"nodes": 1, "tasks": 1, "gpus": 0, "restarts": min(cluster.restarts, 50)})
    (number,) = _queue([CommandJob(tuple(arguments))], single, name=name, folder=folder, dependency=after, command=True)
    log = str(folder.absolute() / f"{number}_0_log.out")
    job = JobRecord("slurm", number, time.time(), os.uname().nodename, log=log)
    write_record(record, replace(job, command=command, dependency=dependency or ""))
    return number


# ---------------------------------------------------------------- checks


def check(configs: Sequence[RunConfig], dependency: str | None = None) -> None:
    """Check everything that can be known before a job waits for hours.

    Raises:
        ConfigError, DataError, WorldError: see `submit`.
    """
    _check_words(configs)
    clusters = [config.cluster for config in configs if isinstance(config.cluster, SlurmCluster)]
    if dependency is not None and len(clusters) < len(configs):
        raise ConfigError("--dependency needs cluster.kind=slurm: runs on this machine cannot wait for jobs")
    if dependency is None:  # else earlier jobs may make the files
        for config in configs:
            _check_files(config)
    if clusters:
        _check_site(clusters)


def _check_words(configs: Sequence[RunConfig]) -> None:
    for config in configs:
        cluster = config.cluster
        if not isinstance(cluster, SlurmCluster):
            continue
        where = str(Path(config.path).absolute())
        if "%" in where or "\\" in where:
            raise ConfigError(
                f"folder '{where}': SLURM interprets % and \\ in the names of logs, and the job "
                "would end without a log; set folder=... without them"
            )
        least = cluster.save + _START_UP
        if seconds(cluster.time) <= least:
            raise ConfigError(
                f"cluster.time = {cluster.time}: a run saves {cluster.save} s before the limit (cluster.save) and "
                f"needs about {_START_UP} s to start; allowed: more than {least} s, or set cluster.save lower"
            )
    _check_shards(configs)


def _check_shards(configs: Sequence[RunConfig]) -> None:
    """Raise ConfigError if shard_size does not divide a job's ranks; print a note if a copy is spread over nodes."""
    notes: list[str] = []
    for config in configs:
        engine, cluster = config.engine, config.cluster
        if not isinstance(engine, Fsdp2Engine) or not isinstance(cluster, SlurmCluster) or engine.shard_size is None:
            continue
        shards_of(engine.shard_size, cluster.nodes * cluster.nproc)
        if cluster.nproc % engine.shard_size:
            notes.append(
                f"note: engine.shard_size={engine.shard_size}, but a node has {cluster.nproc} ranks: those that share "
                "a copy of the weights are on several nodes"
            )
    for note in dict.fromkeys(notes):
        say(note)


def _check_files(config: RunConfig) -> None:
    """Check the files that the run will open."""
    if isinstance(config.stream, ShardStream):
        splits, scenario = (config.stream.train_split, config.stream.test_split), config.stream.scenario
        copies = None if config.memory.keep == "reference" else RunFolder(Path(config.path)).copies
        for number, part in enumerate(config.stream.parts):
            classes, tasks = part.classes, part.tasks
            if isinstance(scenario, FewShotScenario):
                classes, tasks = scenario.base + scenario.way * (part.tasks - 1), 1
            elif isinstance(scenario, PermutedScenario | RotatedScenario):
                tasks = 1
            manifests = _manifests(part.path, splits, copies, number)
            _check_classes(part.path, manifests, classes, tasks)
    for key, folder in (("data.cache", config.data.cache), ("data.shard_cache", config.data.shard_cache)):
        if folder is not None:
            expanded(key, folder)
    if config.train.first_task_from is not None and not _has_begun(config):
        first_task_folder(config, config.train.first_task_from)
    checkpoint = config.model.checkpoint
    if checkpoint is not None and not expanded("model.checkpoint", checkpoint).is_file():
        raise DataError(f"model.checkpoint '{checkpoint}' is not a file")


def _has_begun(config: RunConfig) -> bool:
    """Whether there are checkpoints, from which the run continues."""
    checkpoints = RunFolder(Path(config.path)).checkpoints
    return checkpoints.is_dir() and any(checkpoints.iterdir())


def _manifests(path: str, splits: tuple[str, str], copies: Path | None, part: int) -> tuple[Manifest, Manifest]:
    """Return the manifests of training and test images; with copies of the memory, the former may be missing."""
    from hpccl.data.shards.copies import manifest_with_copies

    train, test = splits
    return (
        manifest_with_copies(path, train, folder=copies, part=part),
        manifest_with_copies(path, test, folder=None, part=part),
    )


def _check_classes(path: str, manifests: Sequence[Manifest], classes: int | None, tasks: int) -> None:
    for manifest in manifests:
        there = len(manifest.classes)
        kept = classes or there
        if kept > there or kept % tasks:
            raise ConfigError(
                f"'{path}' has {there} classes: {kept} of them cannot be split into {tasks} equal tasks; change "
                "stream.parts.*.classes or stream.parts.*.tasks"
            )


def _check_site(clusters: Sequence[SlurmCluster]) -> None:
    missing = [command for command in ("sbatch", "srun", "scontrol", "squeue") if shutil.which(command) is None]
    if missing:
        raise WorldError(
            f"no {', '.join(missing)} on PATH: this is not a machine of a SLURM cluster; use its login node, load its "
            "module, or set cluster.kind=local. --dry-run prints the script anywhere"
        )
    _require_submitit()
    wanted = {cluster.partition for cluster in clusters} - {None}
    known = _partitions() if wanted else set()
    unknown = sorted(name for name in wanted if name is not None and known and not set(name.split(",")) <= known)
    if unknown:
        raise ConfigError(
            f"cluster.partition = {', '.join(unknown)}: no such partition; there are: {', '.join(sorted(known))}"
        )


def _require_submitit() -> None:
    try:
        import submitit  # noqa: F401 - is it installed?
    except ImportError as error:
        raise WorldError(
            "submitit is not installed: pip install 'hpccl[slurm]', or use `sbatch slurm/train.sbatch` without it"
        ) from error


def _partitions() -> set[str]:
    """Return the names of the partitions, also of hidden ones; empty if SLURM does not answer."""
    try:
        done = subprocess.run(
            ["sinfo", "--all", "--noheader", "--format=%R"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return set()
    return set(done.stdout.split())


def _is_done(config: RunConfig) -> bool:
    """Whether the run is done; raise FolderError if its folder holds another run."""
    refuse_another(config)
    folder = RunFolder(Path(config.path))
    return folder.events.exists() and any(event["event"] == "done" for event in read_events(folder.events))


def _live(configs: Sequence[RunConfig]) -> dict[str, tuple[JobRecord, str]]:
    """Return the runs whose newest job is queued or running, with job and state: two must not train in one folder."""
    newest = {config.path: read_records(RunFolder(Path(config.path)))[-1:] for config in configs}
    return _alive({path: record for path, found in newest.items() for record in found})


def _alive(records: Mapping[str, JobRecord]) -> dict[str, tuple[JobRecord, str]]:
    """Return the records whose job is queued or running, with its state."""
    queued = [record.id for record in records.values() if record.kind == "slurm"]
    told = states(queued) if queued and shutil.which("squeue") is not None else {}
    live = {}
    for path, record in records.items():
        if record.kind == "slurm" and record.id in told and told[record.id].alive:
            live[path] = record, told[record.id].word
        if record.kind == "local" and _runs_here(record):
            live[path] = record, "running"
    return live


def _runs_here(record: JobRecord) -> bool:
    here = record.host == os.uname().nodename
    return here and record.id.isdecimal() and birth(int(record.id)) == record.born > 0


# ---------------------------------------------------------------- submitit


def _by_cluster(configs: Sequence[RunConfig]) -> Iterator[tuple[Any, list[RunConfig]]]:
    """Group the runs by cluster settings: those of a group share an array."""
    keyed = sorted(configs, key=lambda config: config.cluster.model_dump_json())
    for _, group in groupby(keyed, key=lambda config: config.cluster.model_dump_json()):
        runs = list(group)
        yield runs[0].cluster, runs


def _submission_folder(runs: Sequence[RunFolder]) -> Path:
    """Return the folder for submitit's files: the run's, or the sweep's."""
    if len(runs) == 1:
        return runs[0].logs / "slurm"
    return Path(os.path.commonpath([str(run.path.absolute()) for run in runs])) / "slurm"


def _queue(
    jobs: Sequence[Any],
    cluster: SlurmCluster,
    *,
    name: str,
    folder: Path,
    dependency: str | None,
    command: bool = False,
) -> list[str]:
    """Submit jobs, as an array if there are several; return their numbers. Raise WorldError if SLURM refuses."""
    from submitit.core.utils import FailedJobError, FailedSubmissionError
    from submitit.helpers import clean_env

    executor = _executor(cluster, parameters(cluster, name=name, dependency=dependency, command=command), folder)
    # Do not pass a job's variables on to another one; keep SBATCH_ACCOUNT and the like of a login shell.
    outside = clean_env() if "SLURM_JOB_ID" in os.environ else contextlib.nullcontext()
    try:
        with outside, executor.batch():
            handles = [executor.submit(job) for job in jobs]
    except (FailedJobError, FailedSubmissionError) as error:
        words = re.sub(r"\s+", " ", str(error)).strip()
        raise WorldError(
            f"sbatch refused the job: {words}; change cluster.* (`--dry-run` prints the script)"
        ) from error
    except OSError as error:
        raise FolderError(f"'{folder}' cannot be written: {error.strerror}") from error
    return [handle.job_id for handle in handles]


def _executor(cluster: SlurmCluster, told: Mapping[str, Any], folder: Path) -> SlurmExecutor:
    from submitit import SlurmExecutor

    executor = SlurmExecutor(folder=folder, python=python_command(cluster))
    executor.update_parameters(**told)
    return executor


def _text(cluster: SlurmCluster, name: str, folder: Path, dependency: str | None, *, count: int) -> str:
    _require_submitit()
    from submitit.slurm.slurm import _make_sbatch_string  # the executor itself needs srun

    told = parameters(cluster, name=name, dependency=dependency)
    command = f"{python_command(cluster)} -u -m submitit.core._submit {shlex.quote(str(folder.absolute()))}"
    array = count if count > 1 else None
    text: str = _make_sbatch_string(command=command, folder=folder.absolute(), map_count=array, **told)
    return text
