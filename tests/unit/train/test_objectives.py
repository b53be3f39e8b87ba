"""What a run trains on and measures, against its definition written out: dark experience, the curvature of the rest."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hpccl.curvature.diagonal import Diagonal
from hpccl.data.rows import Request
from hpccl.train.compose import Composer, split
from hpccl.train.consolidate import select
from hpccl.train.loss import weighted_nats
from hpccl.train.plan import plan_task
from hpccl.train.state import RunState, World
from tests.run.method import learn, make_world, merged

ER_ACE: dict[str, Any] = {
    "memory": {"total": 40, "selector": {"kind": "reservoir"}},
    "prior": {"replay": 1.0, "scale_to_new": True},
    "train": {"head": "seen", "competing": "task"},
}
DER_PP: dict[str, Any] = {
    "memory": {"total": 40, "selector": {"kind": "reservoir"}, "labels": "kept"},
    "prior": {"loss": "squared", "view": "recorded", "weight": 0.2, "label_weight": 0.5, "scale_to_new": True},
}


def pixels(world: World, samples: npt.NDArray[np.int64]) -> Tensor:
    (found,) = world.stream.load([Request(samples, np.zeros(len(samples), dtype=np.uint64))])
    return found.pixels


def summed_ce(net: nn.Module, world: World, samples: npt.NDArray[np.int64], classes: list[int]) -> Tensor:
    labels = torch.tensor([classes.index(int(label)) for label in world.stream.labels("train")[samples]])
    return functional.cross_entropy(net(pixels(world, samples))[:, classes], labels, reduction="sum")


@pytest.mark.parametrize("head", ["own", "seen"])
def test_rows_of_dark_experience_are_its_objective(tmp_path: Path, head: str) -> None:
    """Buzzega et al. 2020, equation 6: E_D CE + alpha E_M (z - q)^2 + beta E_M CE, times N / (N + M)."""
    config = merged(DER_PP, {"train": {"head": head, "epochs": 1, "batch_size": 1000}})
    state, world = make_world(config, tmp_path)
    learn(state, world, 2)
    memory, net, seen = state.prior.memory, state.engine.module.eval(), list(range(6))
    found, own = third_task(state, world)
    new = summed_ce(net, world, own, [4, 5] if head == "own" else seen) / len(own)
    labelled = torch.zeros(())
    for old in (0, 1):
        kept = memory.sample[memory.task == old].numpy()
        labelled += summed_ce(net, world, kept, [2 * old, 2 * old + 1] if head == "own" else seen) / len(memory)
    columns = memory.columns(torch.arange(len(memory)))
    dark = (net(pixels(world, memory.sample.numpy())).gather(1, columns) - memory.soft).square().mean()
    expected = len(own) / (len(own) + len(memory)) * (new + 0.2 * dark + 0.5 * labelled)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_classes_to_come_compete_if_they_are_asked_to(tmp_path: Path) -> None:
    """The code of Buzzega et al. 2020: cross-entropy over all outputs, of new and of remembered images."""
    config = merged(DER_PP, {"train": {"head": "seen", "competing": "all", "epochs": 1, "batch_size": 1000}})
    state, world = make_world(config, tmp_path)
    learn(state, world, 2)
    memory, net, every = state.prior.memory, state.engine.module.eval(), list(range(10))
    found, own = third_task(state, world)
    new = summed_ce(net, world, own, every) / len(own)
    old = net(pixels(world, memory.sample.numpy()))
    labelled = summed_ce(net, world, memory.sample.numpy(), every) / len(memory)
    expected = new + 0.2 * (old - memory.soft).square().mean() + 0.5 * labelled
    torch.testing.assert_close(found, len(own) / (len(own) + len(memory)) * expected, rtol=1e-5, atol=1e-6)


def test_rows_of_new_images_leave_old_classes_alone(tmp_path: Path) -> None:
    """ER-ACE (Caccia et al. 2022): E_D CE among the new classes + E_M CE among all that were seen.

    The task's examples that the reservoir will hold are rows of the second kind already.
    """
    state, world = make_world(merged(ER_ACE, {"train": {"epochs": 1, "batch_size": 1000}}), tmp_path)
    learn(state, world, 2)
    memory, net = state.prior.memory, state.engine.module.eval()
    found, own = third_task(state, world)
    held = np.intersect1d(select(world.stream.tasks[2], memory, state, world).sample.numpy(), own)
    assert 0 < len(held) < len(own)
    new = summed_ce(net, world, np.setdiff1d(own, held), [4, 5]) + summed_ce(net, world, held, list(range(6)))
    new = new / len(own)
    old = summed_ce(net, world, memory.sample.numpy(), list(range(6))) / len(memory)
    torch.testing.assert_close(found, len(own) / (len(own) + len(memory)) * (new + old), rtol=1e-5, atol=1e-6)


def third_task(state: RunState, world: World) -> tuple[Tensor, npt.NDArray[np.int64]]:
    """The loss of the one step that has all images of the third task and of memory, and the task's own images."""
    config, task, memory = world.config, world.stream.tasks[2], state.prior.memory
    plan = plan_task(config, world.stream, task, memory)
    composer = Composer.build(config, world.stream, task, memory, teacher=None, device=torch.device("cpu"))
    (part,) = split(plan.batch(0), world.comm, accumulate=1)
    (images,) = world.stream.load([composer.request(part)])
    rows = composer.rows(part, images)
    found = weighted_nats(state.engine.module.eval()(rows.pixels), rows).sum() / len(part.batch)
    return found, np.arange(task.samples("train").start, task.samples("train").stop)


def test_curvature_is_that_of_the_examples_that_were_not_kept(tmp_path: Path) -> None:
    curvature = {"kind": "diagonal", "fisher": "empirical"}
    config = merged({"memory": {"size": 50}, "prior": {"quadratic": {"weight": 1.0}}, "curvature": curvature})
    state, world = make_world(config, tmp_path)
    learn(state, world, 1)
    quadratic, samples = state.prior.quadratic, world.stream.tasks[0].samples("train")
    assert quadratic is not None
    assert isinstance(quadratic.precision, Diagonal)
    rest = np.setdiff1d(np.arange(samples.start, samples.stop), state.prior.memory.sample.numpy())
    images = pixels(world, rest).double()
    net, labels = state.engine.module.double().eval(), torch.from_numpy(world.stream.labels("train")[rest])
    total = {name: torch.zeros_like(weight) for name, weight in net.named_parameters()}
    for image, label in zip(images, labels, strict=True):
        loss = functional.cross_entropy(net(image[None])[:, :2], label[None])
        for name, gradient in zip(total, torch.autograd.grad(loss, list(net.parameters())), strict=True):
            total[name] += gradient.square()
    for name, value in total.items():
        torch.testing.assert_close(
            quadratic.precision.values[name].double(), value, rtol=1e-4, atol=1e-5 * float(value.max())
        )
