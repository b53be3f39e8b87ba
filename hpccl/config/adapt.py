"""The configurations of an adaptation and of its reference, made from that of the adapted run."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hpccl.config.adaptation import AnyAdaptation
from hpccl.config.load import load, load_recorded
from hpccl.config.run import READING, RunConfig
from hpccl.errors import ConfigError, FolderError
from hpccl.folder import RunFolder

__all__ = ["SETTINGS", "adapted_config", "named", "reference_config"]

# Settings that may override the run's: how weights are trained, and how memory is weighted. All others would change
# what memory means or how the network is tested, so that a gain over the run would not be due to the adaptation.
_SECTIONS = ("optim", "engine", "cluster", "checkpoint", "log")
_TRAIN = ("epochs", "batch_size", "accumulate", "clip_norm", "ema", "frozen", "norms")
_PRIOR = ("weight", "scale_to_task", "temperature", "view")
_DATA = tuple(f"data.{name}" for name in READING)  # how images are fetched
_KEYS = (*(f"train.{name}" for name in _TRAIN), *(f"prior.{name}" for name in _PRIOR), *_DATA)
SETTINGS = f"{', '.join(_KEYS)}; all of {', '.join(_SECTIONS)}; with --model, all of model"  # in words
_REFERENCE = ("model", "engine", "cluster", "checkpoint", "log")  # settings that also apply to the reference
_PULLS = ("optim.weight_decay", "optim.prior_precision")  # likewise, if another prior replaces the run's
_NO_QUADRATIC = ("prior.quadratic.weight=0", "prior.quadratic.decay=1")  # it is for other weights
_ALL_LEARNS = ("train.frozen=[]", "train.norms=batch")  # all weights learn, as in RUN's first task


def adapted_config(
    run: Path, out: Path, *, task: int, change: Mapping[str, Any], model: str | None, settings: Sequence[str]
) -> RunConfig:
    """The configuration of RUN, adapted.

    Args:
        run: folder of the run.
        out: folder of the adaptation.
        task: the last task of the run.
        change: `kind` and its keys, of section adapt.
        model: kind of the other network, for kind=model.
        settings: `key=value` that override the run's.

    Raises:
        ConfigError: a setting is not allowed, or clashes, or `out` is RUN.
        FolderError: RUN is not a run, or is itself an adaptation.
    """
    source = _source(run)
    if out.resolve() == run.resolve():
        raise ConfigError(f"--out '{out}' is the run that is adapted, which stays as it is; give another --out")
    for setting in settings:
        _refuse_fixed(setting, model)
    words = _words(run, out, source, task=task, change=change)
    words += [*_model(model), "train.data=task"]
    if model is not None:
        words += [*_NO_QUADRATIC, *_ALL_LEARNS]
    return load([run / "config.yaml"], [*words, *settings])


def reference_config(
    run: Path, out: Path, *, task: int, change: Mapping[str, Any], model: str | None, settings: Sequence[str]
) -> RunConfig:
    """The same for the reference: as RUN, but a new network, trained on all examples that the adapted one stands for.

    Raises:
        ConfigError: a setting clashes.
        FolderError: RUN is not a run.
    """
    source = _source(run)
    words = _words(run, out, source, task=task, change={**change, "retrain": True})
    if source.train.competing == "task":
        words.append("train.competing=seen")  # no class is new where all data are there at once
    words += [*_model(model), "name=retrain", "train.data=seen", *_NO_QUADRATIC, "prior.fromp.weight=0"]
    words += [*_ALL_LEARNS, "prior.topology.nodes=0"]
    words += [
        "memory.size=0",
        "memory.total=0",
        "memory.fraction=0",
        "memory.mix.kind=natural",
        "prior.normal.weight=1",
    ]
    words += ["prior.replay=0", "prior.weight=1.0", "prior.temperature=1.0", "prior.view=stored", "prior.classes=seen"]
    pulls = _PULLS if change["kind"] == "precision" else ()
    keys = [setting.split("=", 1)[0] for setting in settings]
    shared = [
        setting
        for key, setting in zip(keys, settings, strict=True)
        if key.split(".", 1)[0] in _REFERENCE or key in (*_DATA, *pulls)
    ]
    return load([run / "config.yaml"], [*words, *shared])


def _source(run: Path) -> RunConfig:
    RunFolder(run).require()
    source = load_recorded(run / "config.yaml")
    if isinstance(source.adapt, AnyAdaptation):
        raise FolderError(
            f"'{run}' is an adaptation of '{source.adapt.source}' and has no memory of its own; adapt that run"
        )
    return source


def _words(run: Path, out: Path, source: RunConfig, *, task: int, change: Mapping[str, Any]) -> list[str]:
    adapt = {**change, "source": str(run), "task": task}
    words = [f"adapt.{key}={json.dumps(value)}" for key, value in adapt.items()]
    words += [f"folder={json.dumps(str(out))}", f"name={source.name}-{change['kind']}", "log.reconstruction=0"]
    words += ["train.restart=false", "train.only_last=false", "train.first_task_from=null"]
    return words + (["cluster.kind=local"] if source.cluster.kind == "slurm" else [])


def _model(kind: str | None) -> list[str]:
    return [] if kind is None else [f"model.kind={kind}"]


def _refuse_fixed(setting: str, model: str | None) -> None:
    key = setting.split("=", 1)[0]
    root = key.split(".", 1)[0]
    if (
        any(f"{key}.".startswith(f"{each}.") for each in _KEYS)
        or root in _SECTIONS
        or (root == "model" and model is not None)
    ):
        return
    if key in ("folder", "name"):
        raise ConfigError(f"{setting}: --out sets the folder and the name of an adaptation; leave {key} out")
    if root == "model":
        raise ConfigError(
            f"{setting}: an adaptation keeps the network; to train another one, give its kind with --model"
        )
    raise ConfigError(
        f"{setting}: an adaptation keeps {key} as in its run; leave it out. Keys that may be set one by one: {SETTINGS}"
    )


def named(text: str) -> list[str]:
    """Classes and ids of `--remove`: a file with one per line, or names separated by commas.

    Raises:
        ConfigError: nothing is named, or the file cannot be read.
    """
    path = Path(text)
    try:
        # os.path: a long list of names is no error there, although no path may be as long
        lines = path.read_text(encoding="utf-8").splitlines() if os.path.isfile(text) else text.split(",")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--remove {text}: the file cannot be read: {error}") from error
    found = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not found:
        raise ConfigError(
            f"--remove {text}: names no class and no example; give names separated by commas, or a file of them"
        )
    return found
