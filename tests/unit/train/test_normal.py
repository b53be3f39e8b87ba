"""The normal prior beside true labels: they say themselves what the pull to old weights would say for them."""

from pathlib import Path
from typing import Any

import pytest

from hpccl.checkpoint.store import Mark
from hpccl.train.fit import fit
from hpccl.train.normal import labelled_share, normal_prior
from hpccl.train.reconstruction import reconstruct
from tests.run.method import learn, make_world, merged

NORMAL: dict[str, Any] = {
    "stream": {"kind": "digits", "tasks": 2},
    "train": {"epochs": 1, "head": "seen"},
    "optim": {"name": "adamw", "lr": 1e-2, "weight_decay": 0.0},
}


def of(memory: dict[str, Any], **prior: Any) -> Any:
    return merged(NORMAL, {"memory": memory, "prior": {"normal": {"precision": 2.0}, **prior}})


@pytest.mark.parametrize(
    ("config", "share"),
    [
        (of({"size": 20}, replay=0.0), 0.0),
        (of({"size": 20}, replay=1.0), 20 / 721),
        (of({"size": 20}, replay=0.5), 10 / 721),
        (of({"size": 20}, replay=0.5, scale_to_task=True), 0.5),
        (of({"size": 20}, replay=0.5, share_of="labels", scale_to_task=True), 0.5),
        (of({"size": 20}, replay=0.0, label_weight=3.0), 60 / 721),
        (of({"fraction": 1.0}, replay=1.0), 1.0),
        (of({"fraction": 1.0}, replay=1.0, weight=2.0), 1.0),
    ],
)
def test_the_share_of_the_past_that_true_labels_stand_for(tmp_path: Path, config: Any, share: float) -> None:
    state, world = make_world(config, tmp_path)
    learn(state, world, 1)
    first, second = world.stream.tasks
    assert len(first.samples("train")) == 721
    assert labelled_share(config, world.stream, second, state.prior.memory) == pytest.approx(share)
    prior = normal_prior(second, state.prior, world)
    assert prior is not None
    assert prior.precision == 2.0
    assert prior.pull == pytest.approx(2.0 * (1 - share))


def test_all_of_the_past_with_true_labels_leaves_no_error(tmp_path: Path) -> None:
    """Far from a minimum, too, where the pull of soft labels would err."""
    config = of({"fraction": 1.0}, replay=1.0).model_copy(update={"log": merged({"log": {"reconstruction": 1.0}}).log})
    state, world = make_world(config, tmp_path)
    events: list[dict[str, Any]] = []
    world.log.write = lambda event, **fields: events.append({**fields, "event": event})  # type: ignore[method-assign]
    learn(state, world, 1)
    state.mark = Mark.at(1, "fit", 0)
    assert fit(world.stream.tasks[1], state, world)
    reconstruct(world.stream.tasks[1], state, world)
    (error,) = [event["terms"] for event in events if event["event"] == "reconstruction"]
    assert error["normal"]["norm"] > 0
    assert error["total"]["relative_error"] < 1e-5
