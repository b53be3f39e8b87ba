"""A Gaussian process on the features of a run's network, learned task by task: `hpccl gp fit`.

The features are the input of the network's last layer, at the weights of one checkpoint. They are computed once, a task
at a time; of each task, only its dual parameters and a few examples are kept (hpccl.gp.stream).
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hpccl.checkpoint.tree import write_tree
from hpccl.data.protocols import Split
from hpccl.errors import ConfigError, DataError, FolderError
from hpccl.folder import RunFolder, refuse_unwritable, replacing_folder
from hpccl.gp.kernel import Kernel, Kind
from hpccl.gp.likelihood import Softmax
from hpccl.gp.state import Settings, State, begin
from hpccl.gp.stream import learn, typical_distance
from hpccl.report.events import valid_json
from hpccl.report.metrics import accuracy, expected_calibration_error, negative_log_likelihood
from hpccl.report.text import fixed, markdown_table, percent, whole
from hpccl.report.write import write_json, write_text
from hpccl.tools.evaluate_run import reopened
from hpccl.tools.export import find_finished
from hpccl.train.score import last_layer, looks
from hpccl.train.state import RunState, World

__all__ = ["Fitted", "fit_features", "fit_gp", "markdown", "refuse_out", "write_gp"]

Ints = npt.NDArray[np.int64]
_HEADER = [
    "task",
    "name",
    "images",
    "accuracy / %",
    "NLL / nats",
    "ECE / %",
    "network's accuracy / %",
    "its NLL / nats",
]


@final
@dataclass(frozen=True)
class Fitted:
    """A fitted process, and how well it predicts.

    features: dimension of the features
    names: of the learned tasks
    settings: of hpccl.gp.state
    state: after the last task
    after: for every learned task, figures on the test data of the tasks up to it, over the classes seen by then
    network: by task, the network's own figures in the same setting, as the run has them; None where it has none
    flipped: whether those average logits over mirror images
    """

    run: str
    checkpoint: str
    task: int
    features: int
    names: list[str]
    settings: Settings
    state: State
    after: list[list[dict[str, Any]]]
    network: list[dict[str, Any] | None]
    flipped: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values, without the state's tensors."""
        kernel, posterior, memory = self.state.kernel, self.state.posterior, self.state.memory
        return {
            "format": 1,
            "run": self.run,
            "checkpoint": self.checkpoint,
            "task": self.task,
            "features": self.features,
            "names": self.names,
            "settings": asdict(self.settings),
            "kernel": {
                "kind": kernel.kind,
                "lengthscale": float(kernel.lengthscale),
                "variance": float(kernel.variance),
            },
            "inducing": 0 if posterior is None else len(posterior.inducing),
            "memory": 0 if memory is None else len(memory),
            "num_seen": self.state.num_seen,
            "average_accuracy": float(np.mean([row["accuracy"] for row in self.after[-1]])),
            "after": self.after,
            "network": self.network,
        }


def fit_gp(
    path: Path,
    *,
    settings: Settings,
    task: int | None = None,
    kernel: Kind = "rbf",
    lengthscale: float | None = None,
    variance: float = 1.0,
) -> Fitted:
    """Fit a process to the features of the network after the newest finished task, or after `task`; writes nothing.

    Args:
        path: the run's folder.
        settings: of the process.
        task: counted from 0; its network gives the features, and it is the last task that the process learns.
        kernel: kind of kernel.
        lengthscale: None: the typical distance of the first task's features.
        variance: of the kernel.

    Raises:
        ConfigError: the network's last layer is not an nn.Linear, or tasks have networks of their own.
        DataError: no image of a task can be decoded, or features are not finite.
        DivergedError: a matrix has no Cholesky factor.
        FolderError: the folder is no run, or has no such checkpoint.
    """
    mark = find_finished(RunFolder(path), task)
    with reopened(path, task=mark.task) as (state, world):
        if world.config.own_networks:
            raise ConfigError(
                f"'{path}' trained a separate network for each task (method separate), so tasks share no features; "
                "choose a run with a single network"
            )
        given = Kernel.of(kernel, lengthscale=1.0 if lengthscale is None else lengthscale, variance=variance)
        found, after = fit_features(state, world, settings, given, typical=lengthscale is None)
        posterior = found.posterior
        return Fitted(
            run=str(path),
            checkpoint=mark.name,
            task=mark.task,
            features=0 if posterior is None else posterior.inducing.shape[1],
            names=[each.name for each in world.stream.tasks[: mark.task + 1]],
            settings=settings,
            state=found,
            after=after,
            network=[result["class_incremental"] for result in state.results[: mark.task + 1]],
            flipped=world.config.train.flip_test,
        )


def fit_features(
    state: RunState, world: World, settings: Settings, kernel: Kernel, *, typical: bool
) -> tuple[State, list[list[dict[str, Any]]]]:
    """Learn the tasks up to the state's; return the process and its figures after each task. Collective.

    typical: replace the kernel's length scale by the typical distance of the first task's features.

    Raises: see `fit_gp`.
    """
    _refuse_other_layers(state, world)
    tasks = world.stream.tasks[: state.mark.task + 1]
    classes: list[int] = []  # in order of first appearance, which is that of the latent functions
    gp: State | None = None
    after: list[list[dict[str, Any]]] = []
    tests: list[tuple[Tensor, Ints]] = []
    for task in tasks:
        classes += [label for label in task.classes if label not in classes]  # tasks may share some, or all
        place = np.full(len(world.stream.class_names), -1)
        place[classes] = np.arange(len(classes))
        x, sample = _features(task.samples("train"), state, world, split="train")
        if gp is None:
            scale = typical_distance(x, world.comm) if typical else float(kernel.lengthscale)
            chosen = Kernel.of(kernel.kind, lengthscale=scale, variance=float(kernel.variance))
            gp = begin(chosen.to(x.device), Softmax(len(classes)))
        y = torch.from_numpy(place[world.stream.labels("train")[sample]]).to(x.device)
        number = torch.from_numpy(sample).to(x.device)
        gp = learn(gp.widened(len(classes)), x, y, number, settings=settings, comm=world.comm)
        tests.append(_features(task.samples("test"), state, world, split="test"))
        labels = place[world.stream.labels("test")]
        after.append([_tested(gp, x, sample, labels=labels, world=world) for x, sample in tests])
    assert gp is not None, "a run has a task"
    return gp, after


def _refuse_other_layers(state: RunState, world: World) -> None:
    try:
        last_layer(state.engine.module, world, state)
    except ConfigError as error:
        raise ConfigError(
            "a Gaussian process on features needs a network whose last layer is an nn.Linear; "
            f"{type(state.engine.module).__name__} has none that computes the logits"
        ) from error


def _features(span: range, state: RunState, world: World, *, split: Split) -> tuple[Tensor, Ints]:
    """Return features [n, d] fp32 and positions [n] of the decodable images in this rank's share."""
    rows, samples = [], [np.zeros(0, dtype=np.int64)]
    passed = looks(np.arange(span.start, span.stop), [], state, world, inputs=True, split=split)
    with contextlib.closing(passed) as found:
        for look in found:
            good = torch.from_numpy(look.valid).to(look.x.device)
            rows.append(look.x[good][:, :-1])  # without the 1 for the bias
            samples.append(look.sample[look.valid])
    return torch.cat(rows), np.concatenate(samples)


def _tested(gp: State, x: Tensor, sample: Ints, *, labels: Ints, world: World) -> dict[str, Any]:
    """Return figures on one task's test data, gathered from all ranks, over the classes so far.

    labels: [num_test] index of the latent function of every test image's class
    """
    p = gp.likelihood.predict(*gp.predict(x))
    p, names = world.comm.gather(p).cpu(), world.comm.gather(torch.from_numpy(sample).to(p.device)).cpu().numpy()
    if not len(names):
        raise DataError("no test image of a task can be decoded")
    place = labels[names]
    return {
        "num": len(names),
        "accuracy": accuracy(p.numpy(), place),
        "nll": negative_log_likelihood(p.numpy(), place),
        "ece": expected_calibration_error(p.numpy(), place),
    }


# ---------------------------------------------------------------- files


def markdown(found: Fitted) -> str:
    """Return the figures after the last task as a Markdown table, with notes on kernel and data."""
    said = found.as_dict()
    rows = []
    for task, (row, network) in enumerate(zip(found.after[-1], found.network, strict=True)):
        theirs: Mapping[str, Any] = network or {}
        rows.append(
            [
                str(task + 1),
                found.names[task],
                whole(row["num"]),
                percent(row["accuracy"]),
                fixed(row["nll"]),
                percent(row["ece"]),
                percent(theirs.get("accuracy")),
                fixed(theirs.get("nll")),
            ]
        )
    kernel = said["kernel"]
    notes = (
        f"{found.run}, checkpoint {found.checkpoint}: {kernel['kind']} kernel on {whole(found.features)} features, "
        f"length scale {kernel['lengthscale']:.3g}, variance {kernel['variance']:.3g}; {whole(said['inducing'])} "
        f"inducing inputs, {whole(said['memory'])} of {whole(said['num_seen'])} examples in memory.\n"
        "All classes seen so far compete. The network's figures are those of the run"
        f"{', averaged over mirror images, unlike the Gaussian process' if found.flipped else ''}.\n"
    )
    return markdown_table(_HEADER, rows, left=2) + "\n" + notes


def refuse_out(out: Path) -> None:
    """Check before the work that the files can be written; only those of an earlier fit may be replaced.

    Raises:
        FolderError: the folder cannot be written, or holds other files.
    """
    refuse_unwritable(out, "--out")
    there = {entry.name for entry in out.iterdir()} if out.is_dir() else {out.name} if out.exists() else set()
    others = sorted(there - {"gp.json", "gp.md", "state.json", "state.safetensors"})
    if others:
        raise FolderError(
            f"'{out}' contains files that are not from an earlier fit ({', '.join(others[:3])}) and would be replaced; "
            "choose another folder with --out"
        )


def write_gp(found: Fitted, out: Path) -> Path:
    """Write gp.json, gp.md and the state (state.json, state.safetensors), replacing an earlier fit's; return `out`.

    Raises:
        FolderError: a file cannot be written.
    """
    with replacing_folder(out) as beside:
        write_tree(beside, found.state.state_dict(), header={"format": 1, "checkpoint": found.checkpoint})
        write_json(beside / "gp.json", valid_json(found.as_dict()))
        write_text(beside / "gp.md", markdown(found))
    return out
