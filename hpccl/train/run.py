"""A whole run: resume from the folder's newest checkpoint or start afresh, learn all tasks, write the report."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hpccl.checkpoint.store import Mark, latest, latest_of_all, load, open_shards, refuse_torn
from hpccl.config.adaptation import AnyAdaptation
from hpccl.config.curvature import DenseCurvature, PassCurvature
from hpccl.config.model import TimmModel
from hpccl.config.run import RunConfig
from hpccl.curvature.build import build_estimator
from hpccl.curvature.coverage import plan_ahead
from hpccl.data.protocols import Split, Stream, Task
from hpccl.dist.agree import on_leader
from hpccl.dist.comm import Comm
from hpccl.dist.spread import streamed
from hpccl.engine.build import build_engine, spreads_weights
from hpccl.errors import CapacityError, FolderError, HpcclError
from hpccl.folder import RunFolder, expanded
from hpccl.machine import commit, machine, out_of_memory, slurm_job, versions
from hpccl.memory.store import Memory
from hpccl.models.build import build_model
from hpccl.models.pretrained import Start, start_from
from hpccl.report.events import EventLog, phase_parts, read_events
from hpccl.report.progress import make_progress
from hpccl.report.tensorboard import TensorBoardSink
from hpccl.train.adapt import adaptation_steps, adaptation_task, begin_adapting, continues
from hpccl.train.checks import check_memory, check_sizes
from hpccl.train.consolidate import admit_first, consolidate
from hpccl.train.copies import check_images, copies_advised, drop_images, open_for, reopened_stream
from hpccl.train.evaluate import evaluate, evaluate_all
from hpccl.train.first_task import adopt_first_task, find_first_task
from hpccl.train.fit import fit
from hpccl.train.hold import check_frozen
from hpccl.train.plan import planned_steps
from hpccl.train.reconstruction import reconstruct
from hpccl.train.state import RunState, World
from hpccl.train.stop import Stop, Stopped
from hpccl.train.topology import begin_session

__all__ = [
    "fresh_model",
    "fresh_state",
    "run",
    "weights_sha256",
]


def run(config: RunConfig, comm: Comm, stop: Stop, *, command: Sequence[str] = (), quiet: bool = False) -> str:
    """Train on the whole stream; return `done`, or `stopped` if it was asked to stop (run again to continue).

    A run that was done before is not changed; only its report is written anew.

    Raises:
        HpcclError: something a user can fix; it is also written to events.jsonl.
    """
    folder = RunFolder(Path(config.path))
    folder.create()
    outcome = "done" if _was_done(folder, comm) else _go_on(config, comm, stop, command, quiet=quiet)
    if comm.leader:
        from hpccl.report.write import report_run  # loads the plotting library, which other ranks do without

        report_run(folder.path)
    return outcome


def _was_done(folder: RunFolder, comm: Comm) -> bool:
    """Whether the run has ended, its last checkpoint being intact or deleted; decided by the first rank. Collective.

    Raises:
        CheckpointError: the last checkpoint is damaged (on the first rank).
        WorldError: the same, on the other ranks.
    """
    return comm.any(bool(on_leader(comm, lambda: _ended(folder), "read the last checkpoint")))


def _ended(folder: RunFolder) -> bool:
    newest = latest(folder.checkpoints)
    if (newest is not None and newest.phase != "done") or not folder.events.exists():
        return False
    turns = [each for each in read_events(folder.events) if each["event"] in ("done", "checkpoint", "step", "task")]
    if not turns or turns[-1]["event"] != "done":
        return False
    if newest is None:  # checkpoints were deleted to save space; the results remain
        return True
    saved = next((each for each in reversed(turns) if each["event"] == "checkpoint"), None)
    if saved is None or Mark.at(saved["task"], saved["phase"], saved["step"]) != newest:
        return False
    load(folder.checkpoints, newest)
    refuse_torn(folder.checkpoints, newest)
    return True


def _go_on(config: RunConfig, comm: Comm, stop: Stop, command: Sequence[str], *, quiet: bool) -> str:
    """Start or continue the run, with its event log open."""
    folder = RunFolder(Path(config.path))
    sinks = [TensorBoardSink(folder.tensorboard)] if config.log.tensorboard and comm.leader else []
    with EventLog(folder.events, enabled=comm.leader, sinks=sinks) as log:
        try:
            with make_progress(comm.leader and not quiet) as progress:
                stream = open_for(config, folder)
                world = World(config, comm, stream, folder, log, progress, stop)
                with _memory_explained(config, comm):
                    outcome = _through_the_stream(world, command)
        except HpcclError as error:
            with contextlib.suppress(FolderError):  # a full disk, say, has no room for its own error
                log.write("error", kind=type(error).__name__, message=str(error), begun="run" in log.kinds)
            raise
    return outcome


@contextlib.contextmanager
def _memory_explained(config: RunConfig, comm: Comm) -> Iterator[None]:
    """Turn out-of-memory errors into one that names settings which need less memory.

    Raises:
        CapacityError: memory ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        words = out_of_memory(error)
        if words is None:
            raise
        raise CapacityError(
            f"out of memory on rank {comm.rank} of {comm.size} ({words}); {_what_takes_less(config)}"
        ) from error


def _what_takes_less(config: RunConfig) -> str:
    """Advice for an error message: first settings that a begun run may change, then those that need a new run."""
    train, model = config.train, config.model
    here = ["more processes or devices"]
    if config.measures_curvature:
        here.append(f"a lower curvature.batch_size (now {getattr(config.curvature, 'batch_size', 0)})")
    if isinstance(model, TimmModel) and not config.engine.recompute:
        here.append("engine.recompute=true")
    here += ["engine.kind=fsdp2, which shards the weights"] if config.engine.kind == "ddp" else []
    return (
        f"use {', '.join(here)}; or, in another folder=..., a higher train.accumulate "
        f"(now {train.accumulate}), a lower train.batch_size (now {train.batch_size}) or a smaller network"
    )


def _through_the_stream(world: World, command: Sequence[str]) -> str:
    config, stream = world.config, world.stream
    check_memory(config, stream)
    begun = time.perf_counter()
    found = latest_of_all(world.folder.checkpoints, world.comm)
    if found is None:
        _refuse_lost(world)
        check_sizes(config, stream)  # of a run that has begun, the network was checked before
    if found is None and config.train.first_task_from is not None:
        find_first_task(config, config.train.first_task_from)
    # A network that is reset for every task needs its pretrained weights again; others are in the checkpoint.
    pretrained = (found is None or config.train.restart) and not continues(config)
    model, start = fresh_model(config, stream, pretrained=pretrained)
    state = _state_of(model, config, stream, world.comm)
    if config.measures_curvature and isinstance(config.curvature, PassCurvature):
        build_estimator(config.curvature, config.seed, state.coverage).check(state.engine.module)
    check_frozen(state, world)
    try:
        world = _begun(state, world, command, start) if found is None else _taken_up(state, world, command, found)
        for task in _tasks(config, stream, state.mark):
            if state.mark.task < task.index:
                state.mark = Mark.at(task.index, "fit", 0)
            _learn(task, state, world)
            world = _with_copies(state, world)
    except Stopped:
        world.settle(state)
        mark = state.mark
        world.log.write("stop", task=mark.task, phase=mark.phase, step=mark.step, reason=world.stop.reason)
        return "stopped"
    _finish(state, world, time.perf_counter() - begun)
    return "done"


def _begun(state: RunState, world: World, command: Sequence[str], start: Start | None) -> World:
    """Begin a new run: log it and evaluate the network before its first step.

    start: the pretrained weights, None for random ones

    Raises:
        Stopped: the run was asked to stop.
    """
    begin_adapting(state, world)
    _introduce(world, command, None, state)
    if start is not None:
        _tell_start(start, world)
    check_images(_first_task(world.config, world.stream, state.mark), state, world)
    world.log.write("evaluate", task=-1, results=evaluate_all(state, world, last=-1))
    return world


def _taken_up(state: RunState, world: World, command: Sequence[str], found: Mark) -> World:
    """Resume a run from checkpoint `found`."""
    _introduce(world, command, found, state)
    checkpoints = world.folder.checkpoints
    tree = load(checkpoints, found)
    _check_data(tree, world)
    state.load_state_dict(tree, found, open_shards(checkpoints, found), world.comm)
    return _with_copies(state, world)


def _refuse_lost(world: World) -> None:
    """Raise FolderError if events tell of checkpoints but none is left: the run would silently begin anew."""
    events = read_events(world.folder.events) if world.comm.leader else []
    if world.comm.any(any(event["event"] == "checkpoint" for event in events)):
        raise FolderError(
            f"'{world.folder.checkpoints}' is empty, but '{world.folder.events}' records checkpoints: restore them to "
            "continue, give another folder=..., or delete that file to start over and lose its records"
        )


def _with_copies(state: RunState, world: World) -> World:
    """With memory.keep=copy, drop copies that a finished task left unneeded, reopen the stream, and check all images.

    Collective.
    """
    if world.config.memory.keep == "reference":
        return world
    if state.mark.phase == "done":  # earlier, memory may be chosen but not copied yet: older copies are all there is
        drop_images(state.prior.memory, world)
    world = reopened_stream(world)
    check_images(_first_task(world.config, world.stream, state.mark), state, world)
    return world


def _learn(task: Task, state: RunState, world: World) -> None:
    """Learn one task: train, measure, consolidate, evaluate.

    Raises:
        Stopped: the run was asked to stop; phases that are finished are saved.
    """
    if state.mark.phase == "fit":
        if state.mark.step == 0:
            _announce(task, world)
            admit_first(task, state, world)
            begin_session(task, state, world)
        if not (adopt_first_task(task, state, world) or fit(task, state, world)):
            raise Stopped
        if world.stop.requested(world.comm):
            raise Stopped
    reconstruct(task, state, world)
    fresh = world.config.train.restart and world.config.train.data != "memory"
    if not (fresh or _adapts(world.config)):
        consolidate(task, state, world)
    evaluate(task, state, world)
    _write_skipped(world)
    world.save(state, Mark.at(task.index, "done", state.mark.step))
    if world.stop.requested(world.comm) and task.index + 1 < len(world.stream.tasks):
        raise Stopped


def fresh_state(config: RunConfig, stream: Stream, comm: Comm, *, pretrained: bool = True) -> RunState:
    """Return the state before the first step, equal on all ranks; `pretrained` as in `fresh_model`."""
    model, _ = fresh_model(config, stream, pretrained=pretrained)
    return _state_of(model, config, stream, comm)


def fresh_model(config: RunConfig, stream: Stream, *, pretrained: bool) -> tuple[nn.Module, Start | None]:
    """Return the network before the first step, and which pretrained weights it has, if any.

    It is a function of the configuration and, if `pretrained`, of the file model.checkpoint.

    Raises:
        ConfigError: the model is unknown or does not fit the images.
        DataError: its checkpoint file is missing or of another network.
    """
    model = build_model(
        config.model, image_shape=stream.image_shape, num_classes=len(stream.class_names), seed=config.seed
    )
    if config.model.checkpoint is None or not pretrained:
        return model, None
    return model, start_from(model, expanded("model.checkpoint", config.model.checkpoint))


def _state_of(model: nn.Module, config: RunConfig, stream: Stream, comm: Comm) -> RunState:
    """Build the engine around a model; the curvature is planned first, as long as the weights are whole."""
    by_pass = isinstance(config.curvature, PassCurvature) and not isinstance(config.curvature, DenseCurvature)
    measured = config.measures_curvature and by_pass
    coverage = plan_ahead(model, stream.image_shape) if measured and spreads_weights(config) else None
    return RunState(build_engine(config, model, comm), coverage=coverage)


def _check_data(tree: dict[str, Any], world: World) -> None:
    """Refuse data with another fingerprint: memory and order of examples are sample numbers, and would be wrong."""
    if tree["data"] != world.stream.fingerprint:
        raise FolderError(
            f"the data changed since '{world.folder.path}' was started (fingerprint {tree['data'][:12]} then, "
            f"{world.stream.fingerprint[:12]} now); restore the earlier shards, or choose another folder=..."
        )


def _adapts(config: RunConfig) -> bool:
    """Whether this run adapts another or is the reference of an adaptation; both have a single task."""
    return isinstance(config.adapt, AnyAdaptation)


def _tasks(config: RunConfig, stream: Stream, mark: Mark) -> Sequence[Task]:
    """The tasks that are still to be learned."""
    if _adapts(config):
        return () if mark.phase == "done" else (adaptation_task(config, stream),)
    return stream.tasks[_first_task(config, stream, mark) :]


def _first_task(config: RunConfig, stream: Stream, mark: Mark) -> int:
    if config.train.only_last:
        return len(stream.tasks) - 1 if mark.phase != "done" or mark.task < len(stream.tasks) - 1 else len(stream.tasks)
    return mark.task + 1 if mark.phase == "done" else mark.task


def _introduce(world: World, command: Sequence[str], found: Mark | None, state: RunState) -> None:
    config, stream = world.config, world.stream
    if _adapts(config):
        saved = None if found is None else load(world.folder.checkpoints, found)["prior"]["memory"]
        memory = state.prior.memory if saved is None else Memory.from_state_dict(saved)
        steps = adaptation_steps(adaptation_task(config, stream), memory, world)
    else:
        steps = planned_steps(config, stream)
    if found is not None:
        world.progress.message(f"continuing from {found.name}")
    if (advice := copies_advised(config, stream)) is not None:
        world.progress.message(f"note: {advice}")
    if not world.comm.leader:  # git reads the disk, which may be slow: on one rank only
        return
    gpu = torch.cuda.get_device_name() if world.comm.device.type == "cuda" else None
    world.log.write(
        "run",
        format=1,
        commit=commit(),
        command=list(command),
        machine={**machine(), "gpu": gpu, "threads": torch.get_num_threads()},
        versions=versions(),
        world_size=world.comm.size,
        steps=steps,
        job=None if (job := slurm_job()) is None else asdict(job),
        resumed=None if found is None else {"task": found.task, "phase": found.phase, "step": found.step},
    )


def _tell_start(start: Start, world: World) -> None:
    """Log the pretrained weights that a run begins with."""
    if not world.comm.leader:
        return
    with open(start.path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    world.log.write("start", checkpoint=start.path, sha256=digest, fresh=list(start.fresh))
    head = f"; the head is new ({', '.join(start.fresh)})" if start.fresh else ", including the head"
    world.progress.message(f"initial weights from {start.path}{head}")


def _announce(task: Task, world: World) -> None:
    names = world.stream.class_names
    world.log.write(
        "task",
        task=task.index,
        name=task.name,
        classes=list(task.classes),
        class_names=[names[number] for number in task.classes],
        num_train=len(task.samples("train")),
        num_test=len(task.samples("test")),
    )


def _write_skipped(world: World) -> None:
    """Log the undecodable images of all ranks (a rank that reads on demand knows only its own). Collective."""
    splits: tuple[Split, Split] = ("train", "test")
    own = {(split, sample): (name, reason) for split, sample, name, reason in world.stream.skipped()}
    numbers = [[splits.index(split), sample] for split, sample in own]
    everywhere = world.comm.gather(torch.tensor(numbers, dtype=torch.int64).reshape(-1, 2).to(world.comm.device))
    for number, sample in sorted({(int(row[0]), int(row[1])) for row in everywhere}):
        split = splits[number]
        (name,) = world.stream.sample_names(split, np.array([sample]))
        reason = own.get((split, sample), (name, "could not be decoded"))[1]
        world.log.write("skipped", split=split, sample=sample, name=name, reason=reason)


def _finish(state: RunState, world: World, seconds: float) -> None:
    world.settle(state)
    leaves = state.engine.gather()
    digest = weights_sha256(streamed({name: leaves[name] for name in sorted(leaves)}, world.comm))
    images = 0
    if world.comm.leader:
        parts = phase_parts(read_events(world.folder.events))
        images = sum(int(part["images"]) for part in parts if part["phase"] == "fit")
    world.log.write("done", weights_sha256=digest, wall_seconds=seconds, images=images)


def weights_sha256(weights: Iterable[tuple[str, Tensor]]) -> str:
    """Return the SHA-256 digest of weights and buffers, in the given order."""
    digest = hashlib.sha256()
    for name, tensor in weights:
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
