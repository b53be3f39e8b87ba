"""The networks to merge: runs, exports and files of weights, read a layer at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import safetensors
from safetensors import SafetensorError
from torch import Tensor

from hpccl.checkpoint.store import load, open_shards
from hpccl.checkpoint.tree import StoredWhole, read_tree
from hpccl.config.adaptation import AnyAdaptation
from hpccl.config.curvature import MasCurvature, SiCurvature
from hpccl.config.load import load_recorded
from hpccl.curvature.blocks import Block, Layout
from hpccl.curvature.merging import BlockCurve, Curve, DenseCurve, DiagonalCurve
from hpccl.dist.spread import Stored, whole
from hpccl.errors import CheckpointError, ConfigError, DataError, FolderError
from hpccl.folder import RunFolder
from hpccl.models.exported import CONFIG, WEIGHTS
from hpccl.tools.export import CURVATURE, described, find_finished, layer_key, refuse_other_logits

__all__ = ["Curvature", "Source", "groups_of", "open_source", "open_weights", "refuse_other"]

# Name of a layer or parameter -> its states from all ranks' files.
_Read = Callable[[str], Sequence[Mapping[str, Any]]]


@final
@dataclass(frozen=True)
class Curvature:
    """The curvature of a network, read from its files on demand.

    groups: by name of a layer or parameter, the names of the parameters that it couples
    """

    groups: Mapping[str, tuple[str, ...]]
    state: Mapping[str, Any]
    blocks: _Read

    @classmethod
    def of(cls, state: Mapping[str, Any], blocks: _Read, where: str) -> Curvature:
        """Build from the `state_dict` of a Precision, whose tensors are still in their files.

        Raises:
            CheckpointError: damaged, or of an unknown kind.
        """
        try:
            return cls(_groups(state), state, blocks)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the curvature of '{where}' is damaged or of unknown kind ({error!r})") from error

    def read(self, group: str) -> Curve:
        """Read the curvature of one group.

        Raises:
            CheckpointError: damaged.
        """
        if self.state["kind"] == "dense":
            shapes = {name: tuple(shape) for name, shape in self.state["shapes"]}
            return DenseCurve(shapes, whole(self.state["matrix"]))
        diagonals = self.state["values"] if self.state["kind"] == "diagonal" else self.state["rest"]["values"]
        if group in diagonals:
            return DiagonalCurve(group, whole(diagonals[group]))
        (layout,) = (Layout.from_state_dict(each) for each in self.state["layouts"] if each["name"] == group)
        parts = [Block.from_state_dict(layout, each) for each in self.blocks(group)]
        if not parts:
            raise CheckpointError(f"the curvature of layer '{group}' is missing: a file was removed")
        return BlockCurve.of(Block.joined(parts))


def _groups(state: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    match state["kind"]:
        case "kronecker":
            layouts = [Layout.from_state_dict(layout) for layout in state["layouts"]]
            rest = {name: (name,) for name in state["rest"]["values"]}
            return {layout.name: layout.names for layout in layouts} | rest
        case "diagonal":
            return {name: (name,) for name in state["values"]}
        case "dense":
            return {"the network": tuple(name for name, _ in state["shapes"])}
        case kind:
            raise ValueError(f"kind {kind!r}")


@final
@dataclass(frozen=True)
class Source:
    """One network.

    label: the path that the user gave
    config: as in config.json of an export; None for a file of weights alone
    weights: parameters and buffers by name, still in their files
    curvature: None where there is none
    """

    label: str
    config: Mapping[str, Any] | None
    weights: Mapping[str, Stored]
    curvature: Curvature | None

    def weight(self, name: str) -> Tensor:
        """Read a parameter or buffer, unsharded, on the CPU."""
        return whole(self.weights[name])


def open_source(path: Path) -> Source:
    """Open a run (its newest finished task), or a folder of `hpccl export` or `hpccl merge`.

    Raises:
        CheckpointError: damaged.
        ConfigError: every task of the run has a network of its own.
        DataError: the export is damaged, or the data of the run are not there.
        FolderError: it is neither, or no task is finished.
    """
    folder = path.parent if path.name == WEIGHTS else path
    if not (folder / CONFIG).is_file() and not RunFolder(folder).config.is_file():
        raise FolderError(
            f"'{path}' is neither a run folder (it has no config.yaml) nor an export (it has no {CONFIG}); give one of "
            "the two"
        )
    return _exported(folder) if (folder / CONFIG).is_file() else _run(folder)


def open_weights(path: Path) -> Source:
    """Open what `open_source` opens, or a .safetensors file with a network's weights by name.

    Raises:
        DataError: the file cannot be read; and what `open_source` raises.
    """
    if path.suffix == ".safetensors" and not (path.name == WEIGHTS and (path.parent / CONFIG).is_file()):
        return Source(str(path), None, _stored(path), None)
    return open_source(path)


def _run(path: Path) -> Source:
    run = RunFolder(path)
    mark = find_finished(run, None)
    settings = load_recorded(run.config)
    refuse_other_logits(settings, path)
    if settings.own_networks:
        raise ConfigError(
            f"'{path}' trained a separate network for each task (method separate); export one of them "
            f"(hpccl export {path} OUT --task N) and merge the export"
        )
    config, _ = described(run, mark)
    tree = load(run.checkpoints, mark, lazy=True)
    quadratic = tree["prior"]["quadratic"]
    shards = open_shards(run.checkpoints, mark)

    def blocks(layer: str) -> Sequence[Mapping[str, Any]]:
        return shards(lambda name: name == layer).get(layer, [])

    # Not a curvature of this network's loss: an importance, or that of the network before it was adapted.
    other = isinstance(settings.curvature, (MasCurvature, SiCurvature)) or isinstance(settings.adapt, AnyAdaptation)
    measured = None if other else quadratic
    curvature = None if measured is None else Curvature.of(measured["precision"], blocks, str(path))
    return Source(str(path), config, tree["engine"]["weights"], curvature)


def _exported(folder: Path) -> Source:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        config["hpccl"]["model"], config["hpccl"]["tasks"], config["label_names"], config["architecture"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"'{folder}' is not an export by hpccl: {CONFIG} cannot be read ({error!r})") from error
    curvature = None
    if (folder / f"{CURVATURE}.json").is_file():
        _, tree = read_tree(folder, stem=CURVATURE, lazy=True, wanted=lambda key: key == "precision")

        def blocks(layer: str) -> Sequence[Mapping[str, Any]]:
            _, found = read_tree(folder, stem=CURVATURE, wanted=lambda key: key == layer_key(layer))
            states: Sequence[Mapping[str, Any]] = found.get(layer_key(layer), [])
            return states

        curvature = Curvature.of(tree["precision"], blocks, str(folder))
    return Source(str(folder), config, _stored(folder / WEIGHTS), curvature)


def _stored(path: Path) -> dict[str, Stored]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: StoredWhole(path, name, tuple(file.get_slice(name).get_shape())) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise DataError(f"'{path}' cannot be read: {error}") from error


def refuse_other(sources: Sequence[Source], base: Source | None, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse networks that differ in architecture, classes or shapes.

    Args:
        sources: networks, each with a configuration.
        base: network that may have no configuration.
        shapes: of the network's parameters and buffers.

    Raises:
        ConfigError: they differ.
    """
    first = sources[0]
    for other in (*sources[1:], *([base] if base else [])):
        if other.config is None:
            continue
        assert first.config is not None
        for key, word in (("architecture", "the architecture"), ("label_names", "the classes")):
            if other.config[key] != first.config[key]:
                raise ConfigError(
                    f"'{other.label}' and '{first.label}' cannot be merged: {word} differ ("
                    f"{difference(other.config[key], first.config[key])}); merge networks of one architecture that "
                    "were trained over the same classes in the same order"
                )
    for other in (*sources, *([base] if base else [])):
        theirs = {name: tuple(value.shape) for name, value in other.weights.items()}
        differing = [name for name in (*shapes, *theirs) if theirs.get(name) != shapes.get(name)]
        if differing:
            name = differing[0]
            raise ConfigError(
                f"'{other.label}' and '{first.label}' are different networks: '{name}' is {_sides(theirs.get(name))} "
                f"and {_sides(shapes.get(name))} ({len(set(differing))} of {len(shapes)} weights differ)"
            )


def difference(one: Any, other: Any) -> str:
    """Describe the difference of two settings or lists in words."""
    if isinstance(one, list) and isinstance(other, list):
        if len(one) != len(other):
            return f"{len(one)} and {len(other)} entries"
        place = next(number for number, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1])
        return f"number {place} is '{one[place]}' and '{other[place]}'"
    return f"'{one}' and '{other}'"


def _sides(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else "x".join(map(str, shape)) or "one number"


def groups_of(curvatures: Sequence[Curvature], names: Sequence[str]) -> list[tuple[str, tuple[str, ...]]]:
    """Partition parameters into the smallest groups that no curvature couples, each with a name for messages."""
    root = {name: name for name in names}

    def found(name: str) -> str:
        while root[name] != name:
            name = root[name]
        return name

    labels: dict[str, str] = {}
    for curvature in curvatures:
        for label, coupled in curvature.groups.items():
            known = [name for name in coupled if name in root]
            for name in known[1:]:
                root[found(name)] = found(known[0])
            if len(known) > 1:
                labels.setdefault(known[0], label)
    members: dict[str, list[str]] = {}
    for name in names:
        members.setdefault(found(name), []).append(name)
    return [
        (next((labels[name] for name in group if name in labels), group[0]), tuple(group)) for group in members.values()
    ]
