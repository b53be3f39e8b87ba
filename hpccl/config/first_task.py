"""The settings that decide the first task, which does not depend on the method: runs can share it."""

from __future__ import annotations

from typing import Any

from hpccl.config.differences import differences, flat
from hpccl.config.load import load_recorded
from hpccl.config.run import RunConfig
from hpccl.errors import ConfigError
from hpccl.folder import RunFolder, expanded

__all__ = ["first_task_folder", "first_task_identity"]


def first_task_folder(config: RunConfig, source: str) -> RunFolder:
    """Return the folder of run `source`, which learns its first task as `config` does.

    Raises:
        ConfigError: it is no run, or learns its first task otherwise.
    """
    other = RunFolder(expanded("train.first_task_from", source))
    if not other.config.is_file():
        problem = "it has no config.yaml" if other.path.is_dir() else "it does not exist"
        raise ConfigError(
            f"train.first_task_from='{source}' is not a run folder: {problem}; give the folder of a run with the same "
            "first task, such as runs/NAME, or null to train the first task here"
        )
    theirs, ours = (flat(first_task_identity(each)) for each in (load_recorded(other.config), config))
    if changed := differences(theirs, ours):
        told = "\n".join(f"  {key}: {there} there, {here} here" for key, there, here in changed)
        raise ConfigError(
            f"train.first_task_from='{source}' trained its first task differently:\n{told}\n"
            "set the same here, give another run, or null to train the first task here"
        )
    return other


def first_task_identity(config: RunConfig) -> dict[str, Any]:
    """Return the settings that determine the weights after the first task.

    Settings that act on later tasks only are left out, and of per-task values all but the first.
    """
    identity = config.identity()
    train, optim, prior = identity["train"], identity["optim"], identity["prior"]
    correct = prior["correct"]
    # Settings without effect on a first task.
    later = {"head_epochs": 0, "frozen": [], "norms": "batch", "first_task_from": None}
    later |= {"competing": "seen"} if train["competing"] == "task" else {}
    return {
        **{key: identity[key] for key in ("seed", "stream", "data", "model", "engine")},
        "train": {**train, "epochs": train["epochs"][0], **later},
        "held_out": [correct["share"], identity["memory"]["total"]] if correct["share"] else None,
        "optim": {**optim, "lr": optim["lr"][0]},
        "prior": {"normal": {"precision": prior["normal"]["precision"]}},
    }
