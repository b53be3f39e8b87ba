"""A whole run: find the state in the folder or start afresh, go through the stream, report."""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hpccl.checkpoint.store import Mark, latest, latest_of_all, load, marks, open_shards, refuse_torn
from hpccl.config.adaptation import AnyAdaptation
from hpccl.config.curvature import DenseCurvature, PassCurvature
from hpccl.config.load import load_recorded
from hpccl.config.model import TimmModel
from hpccl.config.run import RunConfig
from hpccl.curvature.build import build_estimator
from hpccl.curvature.coverage import plan_ahead
from hpccl.data.protocols import Listed, Split, Stream, Task
from hpccl.dist.comm import Comm
from hpccl.dist.spread import streamed
from hpccl.engine.build import build_engine, spreads_weights
from hpccl.errors import CapacityError, ConfigError, FolderError, HpcclError, WorldError
from hpccl.folder import RunFolder
from hpccl.machine import commit, machine, out_of_memory, slurm_job, versions
from hpccl.memory.budget import kept_of, per_class
from hpccl.memory.store import Memory
from hpccl.models.build import build_model, refuse_sizes
from hpccl.models.pretrained import Start, start_from
from hpccl.report.events import EventLog, phase_parts, read_events
from hpccl.report.progress import make_progress
from hpccl.report.tensorboard import TensorBoardSink
from hpccl.train.adapt import adaptation_steps, adaptation_task, begin_adapting, continues
from hpccl.train.compose import planned_steps
from hpccl.train.consolidate import admit_first, consolidate
from hpccl.train.copies import check_images, drop_images, open_for, reopened_stream
from hpccl.train.evaluate import evaluate, evaluate_all
from hpccl.train.fit import fit
from hpccl.train.hold import check_frozen
from hpccl.train.reconstruction import reconstruct
from hpccl.train.state import RunState, World
from hpccl.train.stop import Stop, Stopped
from hpccl.train.topology import begin_session

__all__ = [
    "check_memory",
    "check_sizes",
    "first_task_identity",
    "fresh_model",
    "fresh_state",
    "run",
    "weights_sha256",
]


def run(config: RunConfig, comm: Comm, stop: Stop, *, command: Sequence[str] = (), quiet: bool = False) -> str:
    """Train through the whole stream; returns `done`, or `stopped` if it was asked to stop (run again to continue).

    Of a run that was done before nothing is changed.

    Raises:
        HpcclError: something a user can mend; it is also written to events.jsonl.
    """
    folder = RunFolder(Path(config.path))
    folder.create()
    outcome = "done" if _was_done(folder, comm) else _go_on(config, comm, stop, command, quiet=quiet)
    if comm.leader:
        from hpccl.report.write import report_run  # loads the plotting library, which other ranks do without

        report_run(folder.path)
    return outcome


def _was_done(folder: RunFolder, comm: Comm) -> bool:
    """Whether the run came to its end, and what it ended with is there and whole; as the first rank sees it.

    Raises:
        CheckpointError: the last checkpoint is damaged.
        WorldError: ... as the first rank found.
    """
    done, problem = False, None
    if comm.leader:
        try:
            done = _ended(folder)
        except HpcclError as error:
            problem = error
    if comm.any(problem is not None):
        raise problem or WorldError("the last checkpoint cannot be read: see what the first process says")
    return comm.any(done)


def _ended(folder: RunFolder) -> bool:
    newest = latest(folder.checkpoints)
    if (newest is not None and newest.phase != "done") or not folder.events.exists():
        return False
    turns = [each for each in read_events(folder.events) if each["event"] in ("done", "checkpoint", "step", "task")]
    if not turns or turns[-1]["event"] != "done":
        return False
    if newest is None:  # its checkpoints were deleted to make room, its results are here
        return True
    saved = next((each for each in reversed(turns) if each["event"] == "checkpoint"), None)
    if saved is None or Mark.at(saved["task"], saved["phase"], saved["step"]) != newest:
        return False
    load(folder.checkpoints, newest)
    refuse_torn(folder.checkpoints, newest)
    return True


def _go_on(config: RunConfig, comm: Comm, stop: Stop, command: Sequence[str], *, quiet: bool) -> str:
    """From where the run stands, with its diary open."""
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
    """Say what takes less memory where it runs out.

    Raises:
        CapacityError: it has run out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        words = out_of_memory(error)
        if words is None:
            raise
        raise CapacityError(
            f"memory ran out on rank {comm.rank} of {comm.size} ({words}); {_what_takes_less(config)}"
        ) from error


def _what_takes_less(config: RunConfig) -> str:
    """First what may change in the folder of a run that has begun, then what makes another run of it."""
    train, model = config.train, config.model
    here = ["more processes or devices"]
    if config.measures:
        here.append(f"a lower curvature.batch_size ({getattr(config.curvature, 'batch_size', 0)})")
    if isinstance(model, TimmModel) and not config.engine.recompute:
        here.append("engine.recompute=true")
    here += ["engine.kind=fsdp2, for weights in shards"] if config.engine.kind == "ddp" else []
    return (
        f"less is taken with {', '.join(here)}; or, in another folder=..., with a higher train.accumulate "
        f"({train.accumulate} now), a lower train.batch_size ({train.batch_size}) or a smaller network"
    )


def _through_the_stream(world: World, command: Sequence[str]) -> str:
    config, stream = world.config, world.stream
    check_memory(config, stream)
    begun = time.perf_counter()
    found = latest_of_all(world.folder.checkpoints, world.comm)
    if found is None:
        _refuse_lost(world)
        check_sizes(config, stream)  # the network of a run that began takes them
    if found is None and config.train.first_task_from is not None:
        _first_task_elsewhere(config, config.train.first_task_from)
    # A network that restarts at every task needs its first weights again; any other has them in its checkpoint.
    pretrained = (found is None or config.train.restart) and not continues(config)
    model, start = fresh_model(config, stream, pretrained=pretrained)
    state = _state_of(model, config, stream, world.comm)
    if config.measures and isinstance(config.curvature, PassCurvature):
        build_estimator(config.curvature, config.seed, state.coverage).check(state.engine.module)
    check_frozen(state, world)
    if found is None:
        begin_adapting(state, world)
    _introduce(world, command, found, state)
    if start is not None:
        _tell_start(start, world)
    if found is not None:
        tree = load(world.folder.checkpoints, found)
        _check_data(tree, world)
        state.load_state_dict(tree, found, open_shards(world.folder.checkpoints, found), world.comm)
        world = _with_copies(state, world)
    else:
        check_images(_first_task(config, stream, state.mark), state, world)
        world.log.write("evaluate", task=-1, results=evaluate_all(state, world, last=-1))
    for task in _tasks(config, stream, state.mark):
        if state.mark.task < task.index:
            state.mark = Mark.at(task.index, "fit", 0)
        if not _learn(task, state, world):
            world.settle(state)
            world.log.write(
                "stop", task=task.index, phase=state.mark.phase, step=state.mark.step, reason=world.stop.reason
            )
            return "stopped"
        world = _with_copies(state, world)
    _finish(state, world, time.perf_counter() - begun)
    return "done"


def _refuse_lost(world: World) -> None:
    """Raises FolderError if what the run learned is gone: it would begin anew, and its earlier figures with it."""
    events = read_events(world.folder.events) if world.comm.leader else []
    if world.comm.any(any(event["event"] == "checkpoint" for event in events)):
        raise FolderError(
            f"'{world.folder.checkpoints}' is empty, but '{world.folder.events}' tells of checkpoints: restore them to "
            "continue, give another folder=..., or delete that file to begin anew and lose what it tells"
        )


def _with_copies(state: RunState, world: World) -> World:
    """Read the memory's images from its own copies, where it has some, and see that nothing else is gone."""
    if world.config.memory.keep == "reference":
        return world
    drop_images(state.prior.memory, world)
    world = reopened_stream(world)
    check_images(_first_task(world.config, world.stream, state.mark), state, world)
    return world


def _learn(task: Task, state: RunState, world: World) -> bool:
    """One task: train, measure, consolidate, evaluate. False if stopped; everything done so far is saved."""
    try:
        if state.mark.phase == "fit":
            if state.mark.step == 0:
                _announce(task, world)
                admit_first(task, state, world)
                begin_session(task, state, world)
            if not (_adopt_first_task(task, state, world) or fit(task, state, world)):
                return False
            if world.stop.requested(world.comm):
                return False
        reconstruct(task, state, world)
        fresh = world.config.train.restart and world.config.train.data != "memory"
        if not (fresh or _adapts(world.config)):
            consolidate(task, state, world)
    except Stopped:
        return False
    evaluate(task, state, world)
    _write_skipped(world)
    world.save(state, Mark.at(task.index, "done", state.mark.step))
    return not (world.stop.requested(world.comm) and task.index + 1 < len(world.stream.tasks))


def fresh_state(config: RunConfig, stream: Stream, comm: Comm, *, pretrained: bool = True) -> RunState:
    """The state before the first step, equal on all ranks; `pretrained` as in `fresh_model`."""
    model, _ = fresh_model(config, stream, pretrained=pretrained)
    return _state_of(model, config, stream, comm)


def fresh_model(config: RunConfig, stream: Stream, *, pretrained: bool) -> tuple[nn.Module, Start | None]:
    """The network before the first step, a function of the configuration and, if `pretrained`, of model.checkpoint.

    Raises:
        ConfigError: the model is unknown or does not fit the images.
        DataError: its checkpoint file is missing or of another network.
    """
    model = build_model(
        config.model, image_shape=stream.image_shape, num_classes=len(stream.class_names), seed=config.seed
    )
    if config.model.checkpoint is None or not pretrained:
        return model, None
    return model, start_from(model, Path(config.model.checkpoint).expanduser())


def _state_of(model: nn.Module, config: RunConfig, stream: Stream, comm: Comm) -> RunState:
    """The engine around a model; what needs whole weights is done before it spreads them."""
    by_pass = isinstance(config.curvature, PassCurvature) and not isinstance(config.curvature, DenseCurvature)
    measured = config.measures and by_pass
    coverage = plan_ahead(model, stream.image_shape) if measured and spreads_weights(config) else None
    return RunState(build_engine(config, model, comm), coverage=coverage)


def check_memory(config: RunConfig, stream: Listed) -> None:
    """The rules that only the data can settle.

    Raises:
        ConfigError: the memory is larger than a task, or too small for a part that is held out; a task has one class
            and a head of its own.
    """
    # Of a session of few shots, memory keeps all there is.
    tasks = stream.tasks[:1] if config.stream.scenario.kind == "few_shot" else stream.tasks
    sizes = {task.name: len(task.samples("train")) for task in tasks}
    smallest = min(sizes, key=lambda name: sizes[name])
    if config.memory.size > sizes[smallest]:
        raise ConfigError(
            f"memory.size={config.memory.size} is larger than task '{smallest}', which has {sizes[smallest]} training "
            f"examples; allowed: 0 to {sizes[smallest]} (examples kept of each task)"
        )
    nodes, first = config.prior.topology.nodes, len(stream.tasks[0].samples("train"))
    if nodes > first:
        raise ConfigError(
            f"prior.topology.nodes={nodes} is more than the {first} training examples of the first task; allowed: 1 to "
            f"{first}, or 0 for no topology"
        )
    _check_heads(config, stream)
    _check_means(config, stream)
    share, classes = config.prior.correct.share, len(stream.class_names)
    if share > 0 and 0 in per_class(config.memory.total, share, classes):
        raise ConfigError(
            f"prior.correct.share={share} of memory.total={config.memory.total} leaves no example of each of {classes} "
            f"classes to hold out, or none to learn from; allowed: memory.total >= {math.ceil(classes / share)}, and a "
            "share below 1/2"
        )


def _check_heads(config: RunConfig, stream: Listed) -> None:
    """A class alone in its softmax has probability 1: nothing would be learned, and every accuracy would be 100 %."""
    alone = [task.name for task in stream.tasks if len(task.classes) == 1]
    if alone and config.train.head == "own" and not isinstance(config.adapt, AnyAdaptation):
        raise ConfigError(
            f"train.head=own: task '{alone[0]}' has one class ({len(alone)} such tasks), which has nothing to compete "
            "with, so that nothing would be learned; set train.head=seen, or fewer tasks"
        )


def _check_means(config: RunConfig, stream: Listed) -> None:
    """Of a class without examples in memory there is no mean, so that it would never be predicted."""
    if config.evaluate.classifier != "nearest_mean":
        return
    needs = "each of which needs an example for its mean (evaluate.classifier=nearest_mean)"
    total, classes = config.memory.total, len(stream.class_names)
    if 0 < total < classes:
        raise ConfigError(
            f"memory.total={total} is less than the {classes} classes, {needs}; allowed: at least {classes}"
        )
    for task in stream.tasks:
        kept = kept_of(config.memory, len(task.samples("train")))
        if kept < len(task.classes):
            key = "memory.size" if config.memory.size else "memory.fraction"
            raise ConfigError(
                f"{key}={getattr(config.memory, key[7:])} keeps {kept} examples of task '{task.name}', less than its "
                f"{len(task.classes)} classes, {needs}; raise it"
            )


def check_sizes(config: RunConfig, stream: Stream) -> None:
    """See that the network takes views of all sizes, before anything is trained.

    Raises:
        ConfigError: it does not.
    """
    shape, num_classes = stream.image_shape, len(stream.class_names)
    refuse_sizes(config.model, image_shape=shape, num_classes=num_classes, sides=config.data.sides())


def _check_data(tree: dict[str, Any], world: World) -> None:
    """Memory and the order of examples are numbers of images: refuse other images under the same numbers."""
    if tree["data"] != world.stream.fingerprint:
        raise FolderError(
            f"the data changed since '{world.folder.path}' was begun (fingerprint {tree['data'][:12]} then, "
            f"{world.stream.fingerprint[:12]} now); restore the shards it was begun with, or choose another folder=..."
        )


def _adapts(config: RunConfig) -> bool:
    """Whether this run adapts another, or is such a run's reference: one task, and nothing after it."""
    return isinstance(config.adapt, AnyAdaptation)


def _tasks(config: RunConfig, stream: Stream, mark: Mark) -> Sequence[Task]:
    """Those that are still to be learned."""
    if _adapts(config):
        return () if mark.phase == "done" else (adaptation_task(config, stream),)
    return stream.tasks[_first_task(config, stream, mark) :]


def _first_task(config: RunConfig, stream: Stream, mark: Mark) -> int:
    if config.train.only_last:
        return len(stream.tasks) - 1 if mark.phase != "done" or mark.task < len(stream.tasks) - 1 else len(stream.tasks)
    return mark.task + 1 if mark.phase == "done" else mark.task


def _adopt_first_task(task: Task, state: RunState, world: World) -> bool:
    """Take the first task's weights from another run with the same first task, if the configuration names one."""
    if world.config.train.first_task_from is None or task.index > 0:
        return False
    checkpoints, mark = _first_task_elsewhere(world.config, world.config.train.first_task_from)
    tree, ours = load(checkpoints, mark), world.stream.fingerprint
    if tree["data"] != ours:
        raise ConfigError(
            f"train.first_task_from='{world.config.train.first_task_from}' learned its first task from other data "
            f"(fingerprint {tree['data'][:12]}, here {ours[:12]}): shards were built anew in their place; train that "
            "run again, or set it to null"
        )
    state.engine.put(tree["engine"]["weights"])
    world.save(state, Mark.at(0, "fitted", mark.step))
    return True


def _first_task_elsewhere(config: RunConfig, source: str) -> tuple[Path, Mark]:
    """The checkpoints of the run that train.first_task_from names, and the one that ended its first task.

    Raises:
        ConfigError: it is no run, or learned its first task otherwise.
        FolderError: it has not ended its first task.
    """
    other = RunFolder(Path(source))
    if not other.config.is_file():
        problem = "it has no config.yaml" if other.path.is_dir() else "there is no such folder"
        raise ConfigError(
            f"train.first_task_from='{source}' is not the folder of a run: {problem}; give that of a run with the same "
            "first task, such as runs/NAME, or null to train it"
        )
    theirs, ours = first_task_identity(load_recorded(other.config)), first_task_identity(config)
    differing = sorted(key for key in theirs if theirs[key] != ours[key])
    if differing:
        raise ConfigError(
            f"train.first_task_from='{source}' learned its first task otherwise: {', '.join(differing)} differ"
        )
    ends = [mark for mark in marks(other.checkpoints) if (mark.task, mark.phase) == (0, "fitted")]
    if not ends:
        raise FolderError(
            f"train.first_task_from='{source}' has no checkpoint of its first task's end; run it to there first"
        )
    return other.checkpoints, ends[-1]


def first_task_identity(config: RunConfig) -> dict[str, Any]:
    """What decides the weights after the first task: everything but the prior, and of per-task values the first."""
    identity = config.identity()
    train, optim, prior = identity["train"], identity["optim"], identity["prior"]
    correct = prior["correct"]
    # What says nothing of a first task.
    later = {"head_epochs": 0, "frozen": [], "norms": "batch", "first_task_from": None}
    later |= {"competing": "seen"} if train["competing"] == "task" else {}
    return {
        **{key: identity[key] for key in ("seed", "stream", "data", "model", "engine")},
        "train": {**train, "epochs": train["epochs"][0], **later},
        "held_out": [correct["share"], identity["memory"]["total"]] if correct["share"] else None,
        "optim": {**optim, "lr": optim["lr"][0]},
        "prior": {"normal": {"precision": prior["normal"]["precision"]}},
    }


def _introduce(world: World, command: Sequence[str], found: Mark | None, state: RunState) -> None:
    config, stream = world.config, world.stream
    steps = planned_steps(config, stream)
    if _adapts(config):
        saved = None if found is None else load(world.folder.checkpoints, found)["prior"]["memory"]
        memory = state.prior.memory if saved is None else Memory.from_state_dict(saved)
        steps = adaptation_steps(adaptation_task(config, stream), memory, world)
    if found is not None:
        world.progress.message(f"continuing from {found.name}")
    if not world.comm.leader:  # of what follows, git asks the disk, which may be far away
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
    """Write down which weights a run began with."""
    if not world.comm.leader:
        return
    with open(start.path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    world.log.write("start", checkpoint=start.path, sha256=digest, fresh=list(start.fresh))
    head = f"; the head is new ({', '.join(start.fresh)})" if start.fresh else ", head included"
    world.progress.message(f"first weights from {start.path}{head}")


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
    """Undecodable images that any rank met; a rank that reads on demand knows only its own. Collective."""
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
    """A digest of all weights and buffers in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in weights:
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
