"""Running parts of a real run inside a test: the digits stream, a small network, a folder that is thrown away."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hpccl.cluster.prepare import prepare
from hpccl.config.run import RunConfig
from hpccl.data.build import open_stream
from hpccl.dist.comm import Comm
from hpccl.folder import RunFolder
from hpccl.report.events import EventLog, read_events
from hpccl.report.progress import make_progress
from hpccl.train.consolidate import consolidate
from hpccl.train.fit import fit
from hpccl.train.run import fresh_state, run
from hpccl.train.state import RunState, World
from hpccl.train.stop import Stop
from hpccl.train.topology import begin_session

__all__ = ["DIGITS", "After", "AfterEvent", "go_on", "learn", "make_world", "merged", "weights"]

DIGITS: dict[str, Any] = {
    "model": {"kind": "mlp", "hidden": [16]},
    "train": {"epochs": 3, "batch_size": 64},
    "optim": {"name": "adamw", "lr": 3e-3},
    "log": {"tensorboard": False},
    "checkpoint": {"every": 0},
}


def merged(*changes: dict[str, Any]) -> RunConfig:
    """DIGITS with changes, section by section."""
    sections: dict[str, Any] = {name: dict(value) for name, value in DIGITS.items()}
    for change in changes:
        for name, value in change.items():
            below = sections.get(name, {})
            afresh = not isinstance(value, dict) or ("kind" in value and value["kind"] != below.get("kind"))
            sections[name] = value if afresh else {**below, **value}
    return RunConfig.model_validate(sections)


def make_world(config: RunConfig, folder: Path, comm: Comm | None = None) -> tuple[RunState, World]:
    """A fresh state and its surroundings."""
    comm = comm or Comm.solo()
    run_folder = RunFolder(folder)
    run_folder.create()
    stream = open_stream(config.stream, config.data)
    log = EventLog(run_folder.events, enabled=False)
    world = World(config, comm, stream, run_folder, log, make_progress(False), Stop())
    return fresh_state(config, stream, comm), world


def learn(state: RunState, world: World, tasks: int) -> None:
    """Train and consolidate the first `tasks` tasks."""
    for task in world.stream.tasks[:tasks]:
        state.mark = type(state.mark).at(task.index, "fit", 0)
        begin_session(task, state, world)
        assert fit(task, state, world)
        consolidate(task, state, world)


class After(Stop):
    """A wish to stop that comes when so many tasks are done."""

    def __init__(self, folder: Path, tasks: int) -> None:
        super().__init__()
        self.folder, self.tasks = folder, tasks

    def requested(self, comm: Comm) -> bool:
        if len(list((self.folder / "checkpoints").glob("task-*-done-*"))) >= self.tasks:
            self.request("enough")
        return super().requested(comm)


class AfterEvent(Stop):
    """A wish to stop that comes once a run has told of something; heard wherever ranks agree to go on."""

    def __init__(self, folder: Path, event: str) -> None:
        self.folder, self.event = folder, event
        super().__init__()

    def __getattribute__(self, name: str) -> Any:
        if name == "reason" and self._told():
            self.request("enough")
        return super().__getattribute__(name)

    def request(self, reason: str) -> None:
        vars(self)["reason"] = reason

    def _told(self) -> bool:
        path = RunFolder(self.folder).events
        return path.exists() and any(event["event"] == self.event for event in read_events(path))


def weights(folder: Path) -> str:
    """The digest of a finished run's weights."""
    (done,) = (event for event in read_events(RunFolder(folder).events) if event["event"] == "done")
    return str(done["weights_sha256"])


def go_on(config: RunConfig, tasks: int = 1000) -> str:
    """A whole run, or until so many tasks are done; `done` or `stopped`."""
    return run(config, Comm.solo(), After(prepare(config, []).path, tasks), quiet=True)
