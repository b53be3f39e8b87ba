"""Exporting a network: weights as safetensors, and a config.json in the format of timm's hub."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hpccl.checkpoint.store import FORMAT, Mark, load, marks, open_shards
from hpccl.checkpoint.streamed import write_tensors
from hpccl.checkpoint.tree import write_tree
from hpccl.config.adaptation import AnyAdaptation, RemoveData
from hpccl.config.curvature import MasCurvature, SiCurvature
from hpccl.config.load import load_recorded
from hpccl.config.model import ModelConfig, TimmModel
from hpccl.config.run import RunConfig
from hpccl.config.stream import PermutedScenario, RotatedScenario
from hpccl.curvature.build import precision_from_state
from hpccl.data.augment import Normaliser
from hpccl.data.build import outline
from hpccl.data.outline import Outline
from hpccl.data.protocols import Task
from hpccl.dist.comm import Comm
from hpccl.dist.spread import whole
from hpccl.errors import CheckpointError, ConfigError, FolderError
from hpccl.folder import RunFolder, replacing_folder
from hpccl.models.build import skeleton
from hpccl.models.exported import CONFIG, WEIGHTS
from hpccl.train.copies import copies_of

__all__ = [
    "CURVATURE",
    "README",
    "Exported",
    "described",
    "export",
    "find_finished",
    "layer_key",
    "no_curvature",
    "refuse_other_curvature",
    "refuse_other_logits",
    "refuse_what_is_there",
    "weights_of",
    "write_text",
]

README = "README.md"
CURVATURE = "curvature"  # the stem of two files: what `hpccl merge` needs to know besides the weights


@dataclass(frozen=True)
class Exported:
    """What was written: the folder, the source checkpoint, number and bytes of parameters and buffers."""

    folder: Path
    checkpoint: str
    num_weights: int
    num_bytes: int


def export(path: Path, out: Path, *, task: int | None = None, curvature: bool = False, force: bool = False) -> Exported:
    """Write the network after the newest finished task of a run, or after `task`, to the folder `out`.

    Args:
        path: the run's folder.
        out: the folder to write; it appears whole or not at all.
        task: counted from 0; None: the newest that is finished.
        curvature: also write the curvature that the run measured, for `hpccl merge`.
        force: replace an earlier export in `out`.

    Raises:
        FolderError: the folder is no run or has no such checkpoint, or no curvature in it, or `out` is in the way or
            cannot be written.
        CheckpointError: the checkpoint is damaged.
        ConfigError: every task has a network of its own and `task` is None; or the run is not tested by the network's
            logits alone; or the requested curvature is an importance, or of another network.
        DataError: the run's data is not there; the names of the classes are read from it.
    """
    run = RunFolder(path)
    mark = find_finished(run, task)
    config = load_recorded(run.config)
    if config.own_networks and task is None:
        raise ConfigError(
            f"'{path}' trained a separate network for each task (method separate); "
            f"choose which to export with --task N, 0 to {mark.task}"
        )
    refuse_other_logits(config, path)
    if curvature:
        refuse_other_curvature(config, path)
    refuse_what_is_there(out, force=force)
    content = _Content(run, config, mark, outline(config.stream, config.data, copies=copies_of(config, run)))
    model = skeleton(content.model, image_shape=content.stream.image_shape, num_classes=content.num_classes)
    weights = _checked(dict(weights_of(run, mark)), model, run.checkpoints / mark.name)
    measured = curvature_tree(run, mark) if curvature else None
    with replacing_folder(out) as beside:
        write_tensors(beside / WEIGHTS, weights, metadata={"format": "pt"})
        if measured is not None:
            write_tree(beside, measured, header={"format": FORMAT, "checkpoint": mark.name}, stem=CURVATURE)
        write_text(beside / CONFIG, json.dumps(content.config_json(model), indent=2) + "\n")
        write_text(beside / README, content.readme(out))
    num_bytes = sum(value.nbytes for value in weights.values())
    return Exported(out, mark.name, sum(value.numel() for value in weights.values()), num_bytes)


def refuse_other_logits(config: RunConfig, path: Path) -> None:
    """Refuse runs whose classifier is more than the network, so that its logits would give other predictions.

    Raises:
        ConfigError: the run is not tested by the network's logits alone.
    """
    for key, used in (
        ("prior.correct.share", config.prior.correct.share > 0),
        ("evaluate.classifier", config.evaluate.classifier != "head"),
    ):
        if used:
            raise ConfigError(
                f"'{path}' was tested with {key}, which is not part of the network; allowed: runs that are tested by "
                "the network's own logits (for the weights alone, take those of a checkpoint)"
            )


def refuse_other_curvature(config: RunConfig, path: Path) -> None:
    """Refuse runs whose quadratic is not the curvature of this network's loss.

    Raises:
        ConfigError: it is an importance (MAS, SI), or that of the network before an adaptation.
    """
    if isinstance(config.adapt, AnyAdaptation):
        raise ConfigError(
            f"'{path}' is an adaptation of '{config.adapt.source}'; its curvature is that of the network before it; "
            "give a run that is not an adaptation"
        )
    if isinstance(config.curvature, (MasCurvature, SiCurvature)):
        raise ConfigError(
            f"'{path}' has curvature.kind={config.curvature.kind}, an importance rather than a curvature of the loss: "
            "it gives no posterior and no weights for merging; allowed: runs with any other curvature.kind"
        )


def find_finished(run: RunFolder, task: int | None) -> Mark:
    """Find the newest checkpoint that ended a task, or the one that ended `task`.

    Raises:
        FolderError: the folder is no run, or has no such checkpoint.
    """
    run.require()
    finished = {mark.task: mark for mark in marks(run.checkpoints) if mark.phase == "done"}
    if not finished:
        raise FolderError(f"'{run.path}' has not finished a task yet; continue it with `hpccl train` first")
    if task is not None and task not in finished:
        there = ", ".join(str(number) for number in finished)
        raise FolderError(f"'{run.path}' has no state after task {task}; finished tasks, counted from 0: {there}")
    return finished[max(finished) if task is None else task]


def weights_of(run: RunFolder, mark: Mark) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and buffers of a checkpoint with their names, unsharded, on the CPU.

    Raises:
        CheckpointError: it is damaged.
    """
    for name, value in load(run.checkpoints, mark, only="engine", lazy=True)["engine"]["weights"].items():
        yield name, whole(value)


def described(run: RunFolder, mark: Mark) -> tuple[dict[str, Any], nn.Module]:
    """Return the content of an export's config.json, and the network as a skeleton without memory for its weights.

    Raises:
        DataError: the run's data is not there; the names of the classes are read from it.
    """
    config = load_recorded(run.config)
    content = _Content(run, config, mark, outline(config.stream, config.data, copies=copies_of(config, run)))
    model = skeleton(content.model, image_shape=content.stream.image_shape, num_classes=content.num_classes)
    return content.config_json(model), model


def curvature_tree(run: RunFolder, mark: Mark) -> dict[str, Any]:
    """Return the curvature of a checkpoint: each layer, unsharded, under its own key, the rest under `precision`.

    Raises:
        CheckpointError: it is damaged.
        FolderError: there is none.
    """
    state = load(run.checkpoints, mark, only="prior")["prior"]["quadratic"]
    if state is None:
        raise FolderError(no_curvature(str(run.path), mark.name))
    shards = open_shards(run.checkpoints, mark)
    precision = precision_from_state(state["precision"], shards, Comm.solo())
    layers = {layer_key(name): states for name, states in precision.shard_dict().items()}
    return {"precision": precision.state_dict(), **layers}


def layer_key(layer: str) -> str:
    """Return the key of a layer's blocks in `curvature_tree`."""
    return f"layer {layer}"


def no_curvature(where: str, checkpoint: str) -> str:
    """Return the error message for a checkpoint without curvature."""
    return (
        f"'{where}' has no curvature in checkpoint {checkpoint}: the run was configured with prior.quadratic.weight=0, "
        "which measures none; train in another folder=... with prior.quadratic.weight=1"
    )


def _checked(weights: dict[str, Tensor], model: nn.Module, checkpoint: Path) -> dict[str, Tensor]:
    """Return the weights in the network's order, in fp32 (integers unchanged), after checking names and shapes."""
    own = model.state_dict()
    shapes = {name: tuple(value.shape) for name, value in own.items()}
    if shapes != {name: tuple(value.shape) for name, value in weights.items()}:
        differing = sorted(name for name in shapes.keys() ^ weights.keys())
        raise CheckpointError(
            f"checkpoint '{checkpoint}' is not of the network in config.yaml ({', '.join(differing[:5]) or 'shapes'} "
            "differ); it was written by another version of the model's library, or config.yaml was changed"
        )
    return {name: _plain(weights[name]) for name in own}


def _plain(value: Tensor) -> Tensor:
    return (value.float() if value.is_floating_point() else value).contiguous()


# ---------------------------------------------------------------- the folder


def refuse_what_is_there(out: Path, *, force: bool) -> None:
    """Refuse an existing folder unless `force` is given and it is an earlier export, so that a typo deletes nothing."""
    if not out.exists():
        return
    if not force:
        raise FolderError(f"'{out}' exists; choose another folder, or replace an earlier export with --force")
    ours = {WEIGHTS, CONFIG, README, f"{CURVATURE}.json", f"{CURVATURE}.safetensors"}
    others = sorted({entry.name for entry in out.iterdir()} - ours) if out.is_dir() else [out.name]
    if not others and not _is_export(out):
        raise FolderError(
            f"'{out}' is not an export by hpccl (no matching {CONFIG}), so --force does not replace it; choose another "
            "folder, or delete it yourself"
        )
    if others:
        raise FolderError(
            f"'{out}' contains files that are not part of an export ({', '.join(others[:3])}), so --force does not "
            "replace it; choose another folder, or delete it yourself"
        )


def _is_export(out: Path) -> bool:
    """Whether hpccl wrote the files in a folder (others use the same file names); True if it is empty."""
    if not any(out.iterdir()):
        return True
    try:
        found = json.loads((out / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and "hpccl" in found


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8, flushed to disk."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


# ---------------------------------------------------------------- config.json and README.md


@dataclass(frozen=True, eq=False)
class _Content:
    """The sources of config.json and README.md."""

    run: RunFolder
    config: RunConfig
    mark: Mark
    stream: Outline

    @property
    def model(self) -> ModelConfig:
        """The network's configuration without the file of its pretrained weights."""
        return self.config.model.model_copy(update={"checkpoint": None})

    @property
    def num_classes(self) -> int:
        return len(self.stream.layout.class_names)

    @property
    def learned(self) -> list[Task]:
        """The tasks whose classes this network was trained on."""
        tasks = self.stream.layout.tasks[: self.mark.task + 1]
        return list(tasks[-1:] if self.config.own_networks else tasks)

    @property
    def model_args(self) -> dict[str, Any]:
        """Further arguments of timm.create_model; none for networks that are not timm's."""
        model = self.config.model
        return {"in_chans": self.stream.image_shape[0], **model.options} if isinstance(model, TimmModel) else {}

    def config_json(self, model: nn.Module) -> dict[str, Any]:
        """Return config.json as timm writes it, with an additional entry `hpccl`, which timm ignores."""
        ours = self.model
        known = dict(getattr(model, "default_cfg", None) or {})
        kept = ("architecture", "tag", "fixed_input_size", "pool_size", "first_conv", "classifier")
        architecture = ours.name if isinstance(ours, TimmModel) else f"hpccl.{ours.kind}"
        return {
            "architecture": architecture,
            "num_classes": self.num_classes,
            "num_features": getattr(model, "num_features", None),
            "label_names": list(self.stream.layout.class_names),
            "model_args": self.model_args,
            "pretrained_cfg": {
                **{key: known[key] for key in kept if known.get(key) is not None},
                "custom_load": False,
                "num_classes": self.num_classes,
                **self._input(),
            },
            "hpccl": {
                "loader": "hpccl.models.exported.load_exported",
                "model": ours.model_dump(mode="json"),
                "image_shape": list(self.stream.image_shape),
                "num_classes": self.num_classes,
                "head": self.config.train.head,
                "tasks": [{"name": task.name, "classes": list(task.classes)} for task in self.learned],
                "removed": self.removed,
                "run": self.config.name,
                "checkpoint": self.mark.name,
            },
        }

    def _input(self) -> dict[str, Any]:
        """Return the evaluation view in terms of timm's pretrained_cfg."""
        view, channels = self.stream.view, self.stream.image_shape[0]
        data = self.config.data
        Normaliser.of(data.mean, data.std, channels)  # raises if the numbers of values and channels differ
        mean, std = ([*values] * (1 if len(values) == channels else channels) for values in (data.mean, data.std))
        return {
            "input_size": list(self.stream.image_shape),
            **(
                {"test_input_size": list(self.stream.test_shape)}
                if self.stream.test_shape != self.stream.image_shape
                else {}
            ),
            "interpolation": view.filter,
            "crop_pct": 1.0 if self.stream.as_stored else view.crop_pct,
            "crop_mode": "center",
            "mean": mean,
            "std": std,
        }

    def readme(self, out: Path) -> str:
        """Return the README: what the network is, how to load it, what its outputs mean."""
        return _README.format(
            name=self.config.name,
            method=self.config.method,
            checkpoint=self.mark.name,
            task=self.mark.task + 1,
            last=self.stream.layout.tasks[self.mark.task].name,
            loading=self._loading(out),
            shape=list(self.stream.image_shape),
            steps=self._steps(),
            num_classes=self.num_classes,
            rows="\n".join(_row(task) for task in self.learned),
            unlearned=self._unlearned(),
            head=_HEADS[self.config.train.head],
            figures=self._figures(),
        )

    def _loading(self, out: Path) -> str:
        ours = _OURS.format(out=str(out))
        if not isinstance(self.config.model, TimmModel):
            return f"This network (`{self.config.model.kind}`) is not a timm model; load it with hpccl:\n\n{ours}"
        named = "".join(f", {key}={value!r}" for key, value in self.model_args.items() if key.isidentifier())
        return (
            f"{_TIMM.format(name=self.config.model.name, classes=self.num_classes, out=str(out), named=named)}\n{ours}"
        )

    def _steps(self) -> str:
        view, given = self.stream.view, self._input()
        height, width = self.stream.test_shape[1:]
        brought = (
            f"Images have {width} x {height} pixels and are not resized"
            if view.size is None or self.stream.as_stored
            else f"The shorter side is resized to floor({view.size} / {view.crop_pct:g}) pixels ({view.filter}), the "
            f"central {view.size} x {view.size} pixels are cut out; images of this size stay unchanged"
        )
        return f"{brought}. Then (pixel / 255 - mean) / std, mean {given['mean']}, std {given['std']}"

    def _figures(self) -> str:
        """Describe how the run's figures were computed, where that differs from the network's default use."""
        ways = ["from the mean logits of each image and its mirror image"] * self.config.train.flip_test
        ways += ["with bfloat16 autocast"] * (self.config.engine.precision == "bf16")
        figures = f"\nThe run's own figures were computed {' and '.join(ways)}.\n" if ways else ""
        return figures + self._changed()

    def _changed(self) -> str:
        """Describe how images of later tasks were changed (permuted, rotated); empty where they were not."""
        scenario = self.config.stream.scenario
        match scenario:
            case PermutedScenario():
                how = "its own permutation of the pixels, the same for all of its images"
            case RotatedScenario():
                how = "its images rotated by its own angle"
            case _:
                return ""
        told = ", ".join(f"{key} {value}" for key, value in scenario.model_dump(mode="json").items())
        return (
            f"\nEach task but the first was trained and tested with {how} ({told}): the network expects images of "
            "such a task to be changed in the same way (`hpccl.data.changes`).\n"
        )

    @property
    def removed(self) -> list[str]:
        """The classes that the network was made to forget."""
        adapt, names = self.config.adapt, self.stream.layout.class_names
        return [name for name in names if name in adapt.names] if isinstance(adapt, RemoveData) else []

    def _unlearned(self) -> str:
        learned = {number for task in self.learned for number in task.classes}
        others = self.num_classes - len(learned)
        told = "" if others == 0 else f"\nThe other {others} outputs were not trained; ignore them.\n"
        gone = ", ".join(f"{self.stream.layout.class_names.index(name)} ({name})" for name in self.removed)
        return told + (f"\nThe network was made to forget these outputs; ignore them: {gone}.\n" if gone else "")


def _row(task: Task) -> str:
    first, last = min(task.classes), max(task.classes)
    whole = len(task.classes) == last - first + 1
    outputs = f"{first} to {last}" if whole else ", ".join(map(str, task.classes))
    return f"| {task.index + 1} | {task.name} | {outputs} |"


_README = """# {name}, after task {task} ({last})

A network trained by `hpccl` with method `{method}`, from checkpoint `{checkpoint}`; weights are fp32.

## Load

{loading}
## Input

Shape [n, {shape[0]}, {shape[1]}, {shape[2]}], fp32. {steps}.

## Output

{num_classes} logits, one for each class of the stream; `label_names` in `config.json` names them in order.

| task | name | outputs |
|---:|---|---|
{rows}
{unlearned}
{head}
{figures}"""

_TIMM = """```python
import timm

model = timm.create_model("{name}", num_classes={classes}, checkpoint_path="{out}/model.safetensors"{named}).eval()
```

or, with the settings in `config.json`:
"""

_OURS = """```python
from hpccl.models.exported import load_exported

model = load_exported("{out}")
```
"""

_HEADS = {
    "own": """It was trained with `train.head=own`, which is task-incremental: the outputs of one row of the table are a
separate classifier. Choose the row of the image's task, then the largest of its outputs. Outputs of different
rows were never compared in training.""",
    "seen": """It was trained with `train.head=seen`, which is class-incremental: all outputs in the table compete. Take
the largest of them; where the task of an image is known, the largest in its row.""",
}
