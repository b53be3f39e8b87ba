"""Prepare a run's folder: create it, record configuration, code and environment, and refuse one of another run."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import hpccl
from hpccl.cluster.lock import holder, holding
from hpccl.cluster.records import read_records
from hpccl.config.adaptation import AnyAdaptation
from hpccl.config.differences import differences, flat
from hpccl.config.load import dump, load_recorded
from hpccl.config.run import RunConfig
from hpccl.config.stream import Part, ShardStream
from hpccl.errors import ConfigError, FolderError
from hpccl.folder import RunFolder, expanded, explain_os_error, replacing
from hpccl.machine import ask_git, commit, machine
from hpccl.report.events import Event, read_events

__all__ = ["prepare", "refuse_another", "refuse_any_other"]

# Environment variables that affect a run and are recorded; no others, since they may hold secrets.
_PREFIXES = ("CUDA_VISIBLE", "GLOO_", "HPCCL_", "MKL_NUM", "NCCL_", "OMP_", "SLURM_JOB", "SLURM_NTASKS", "TORCH_")

_OTHER = "another folder=..."


def prepare(config: RunConfig, argv: Sequence[str]) -> RunFolder:
    """Make the run folder and write config.yaml, code.txt and env.txt, unless they are there.

    A folder of the same run is continued; settings that `RunConfig.identity` leaves out may have changed. A folder of
    another run that ended before it learned anything is taken over, with a message.

    Raises:
        ConfigError: the folder's name has an environment variable.
        FolderError: the folder holds another run, or another process trains in it, or it cannot be written.
    """
    before = refuse_another(config)
    folder = RunFolder(Path(config.path))
    folder.create()
    if before is None and folder.config.exists():
        _take_over(folder, config)
    elif before is None:
        _write(folder.config, dump(config))
    elif before != config:
        # A requeued job reads the file again, so it must not change unless this command gets the lock.
        with holding(folder):
            _write(folder.config, dump(config))
    if not folder.code.exists():
        _write(folder.code, _code())
    if not folder.env.exists():
        _write(folder.env, _environment(argv))
    return folder


def refuse_another(config: RunConfig) -> RunConfig | None:
    """Return the configuration in the run's folder if it is of the same run; None if the folder is free.

    A folder is free if it holds no run, or one that may be taken over (see `_unused`).

    Raises:
        ConfigError: the folder's name has an environment variable, which would become a folder of that name.
        FolderError: the folder holds another run, or cannot be read.
    """
    folder = RunFolder(expanded("folder", config.path))
    before = _earlier(folder, config)
    if before is None:
        _refuse_unnamed(folder, config)
        return None
    if before.identity() != config.identity() and holder(folder) is None and _unused(folder) is not None:
        return None
    _refuse_another(before, config, folder)
    return before


def refuse_any_other(config: RunConfig) -> None:
    """Check the folder of a run that begins: it was prepared for it, but may have been taken over since.

    Raises:
        FolderError: the folder holds another run, whether that has learned or not, or cannot be read.
    """
    folder = RunFolder(Path(config.path))
    before = _earlier(folder, config)
    if before is not None:
        _refuse_another(before, config, folder)


# Events before a start's first step, and errors that would recur at every start of the same configuration. After any
# other error a job may be requeued and continue in its folder.
_BEFORE = ("run", "start", "evaluate", "task", "error")
_REFUSALS = ("CapacityError", "ConfigError", "CoverageError", "DataError", "FolderError")


def _unused(folder: RunFolder) -> str | None:
    """Return why the run in a folder that no process holds may be replaced: it ended without having learned anything.

    None if it must stay: it has learned, a job may be waiting for it, or its error may not recur.
    """
    try:
        events = read_events(folder.events) if folder.events.exists() else []
        learned = folder.checkpoints.is_dir() and any(folder.checkpoints.iterdir())
    except (FolderError, OSError):
        return None
    if learned or any(event["event"] not in _BEFORE for event in events):
        return None
    last: Event = events[-1] if events else {"event": "none", "time": 0.0}
    submitted = [record.submitted for record in read_records(folder)]
    if last["event"] != "error":  # crashed or killed; code.txt and env.txt show that a run was started here
        prepared = folder.code.is_file() and folder.env.is_file()
        return "it ended before its first step" if prepared and not submitted else None
    if last.get("kind") not in _REFUSALS or any(moment >= last["time"] for moment in submitted):
        return None
    return f"it ended with {last['kind']}: {last['message']}"


def _take_over(folder: RunFolder, config: RunConfig) -> None:
    """Turn the folder of a run that never learned into this run's, if it still is one.

    Done under the folder's lock, which a run holds while it trains; a run checks its configuration once it has it.

    Raises:
        FolderError: another command was faster, or a file cannot be written.
    """
    with holding(folder):
        before, reason = _earlier(folder, config), _unused(folder)
        if before is not None and (before.identity() == config.identity() or reason is None):
            _refuse_another(before, config, folder)
            return  # prepared for the same run meanwhile
        _write(folder.config, dump(config))
        try:
            for path in (folder.events, folder.error, folder.code, folder.env):
                path.unlink(missing_ok=True)
        except OSError as error:
            raise FolderError(
                f"run folder '{folder.path}' cannot be written: {explain_os_error(error, other=_OTHER)}"
            ) from error
    sys.stderr.write(f"run folder '{folder.path}' is reused: the run in it learned nothing, because {reason}\n")


def _write(path: Path, text: str) -> None:
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def _earlier(folder: RunFolder, here: RunConfig) -> RunConfig | None:
    """Return the configuration in the folder, or None if there is none; `here` is the run to go there, for messages."""
    try:
        if not folder.config.exists():
            return None
        return load_recorded(folder.config)
    except OSError as error:
        raise FolderError(
            f"run folder '{folder.path}' cannot be read: {explain_os_error(error, other=_OTHER)}"
        ) from error
    except ConfigError as error:
        raise FolderError(
            f"run folder '{folder.path}' cannot be continued, because its config.yaml cannot be read:\n{error}\n"
            f"{'give another --out' if _adapts(here) else 'set folder=... to another one, or delete it'}"
        ) from error


def _refuse_unnamed(folder: RunFolder, here: RunConfig) -> None:
    """Raise FolderError if a run has learned or logged in the folder, but its config.yaml is missing."""
    try:
        learned = folder.checkpoints.is_dir() and any(folder.checkpoints.iterdir())
        if not learned and not (folder.events.is_file() and folder.events.stat().st_size):
            return
    except OSError as error:
        raise FolderError(
            f"run folder '{folder.path}' cannot be read: {explain_os_error(error, other=_OTHER)}"
        ) from error
    advice = "give another --out" if _adapts(here) else "set folder=... to another one, or delete it"
    raise FolderError(
        f"run folder '{folder.path}' has {'checkpoints' if learned else 'events'} of a run, but no config.yaml; "
        f"put its config.yaml back to continue it, or {advice}"
    )


def _refuse_another(there: RunConfig, here: RunConfig, folder: RunFolder) -> None:
    changed = differences(flat(there.identity()), flat(here.identity()))
    if not changed:
        return
    differs = "\n".join(f"  {key}: {old} there, {new} here" for key, old, new in changed)
    advice = f"set folder=... (or name=...) for a new run, or delete '{folder.path}', or undo the change to resume"
    if _adapts(here):  # do not advise to delete it: it may be the folder of the run to adapt
        advice = "give another --out, or undo the change to continue what is there"
    elif further := _further_parts(there, here):
        parts = " ".join(f"--part {shlex.quote(part)}" for part in further)
        advice = f"to learn the new parts after its tasks: hpccl extend {folder.path} --out OUT {parts}; or {advice}"
    raise FolderError(f"run folder '{folder.path}' holds a run of another configuration:\n{differs}\n{advice}")


def _further_parts(there: RunConfig, here: RunConfig) -> list[str]:
    """Return the parts of the stream, as `hpccl extend` takes them, that follow those of the run in the folder."""
    if not isinstance(there.stream, ShardStream) or not isinstance(here.stream, ShardStream):
        return []
    first = len(there.stream.parts)
    if here.stream.parts[:first] != there.stream.parts:
        return []
    return [
        part.path if part == Part(path=part.path) else json.dumps(part.model_dump(mode="json", exclude_defaults=True))
        for part in here.stream.parts[first:]
    ]


def _adapts(config: RunConfig) -> bool:
    """Whether it is a run of `hpccl adapt`, whose folder is given by --out."""
    return isinstance(config.adapt, AnyAdaptation)


@functools.cache  # the same for all runs of a sweep
def _code() -> str:
    """Return version and commit, and the uncommitted changes if the code is a git checkout."""
    root = Path(hpccl.__file__).parents[1]
    lines = [f"hpccl {hpccl.__version__}", f"commit {commit()}"]
    # The package may be installed inside some other project's repository: ask for its own file.
    if ask_git(root, "ls-files", "--error-unmatch", "hpccl/__init__.py") is None:
        return "\n".join([*lines, "not under git", ""])
    untracked = (ask_git(root, "ls-files", "--others", "--exclude-standard") or "").strip()
    changes = ask_git(root, "diff", "HEAD", "--no-ext-diff") or ""
    return "\n".join([*lines, "", "untracked files:", untracked or "none", "", "changes:", changes or "none", ""])


def _environment(argv: Sequence[str]) -> str:
    variables = [f"{key}={value}" for key, value in sorted(os.environ.items()) if key.startswith(_PREFIXES)]
    lines = [
        f"command: {shlex.join(argv)}",
        f"working directory: {Path.cwd()}",
        f"python: {sys.version}",
        f"executable: {sys.executable}",
        f"platform: {platform.platform()}",
        *(f"{key}: {value}" for key, value in machine().items()),
        "",
        "variables:",
        *(variables or ["none"]),
        "",
        "packages:",
        *_packages(),
        "",
    ]
    return "\n".join(lines)


@functools.cache
def _packages() -> list[str]:
    return sorted({f"{each.name}=={each.version}" for each in importlib.metadata.distributions()}, key=str.lower)
