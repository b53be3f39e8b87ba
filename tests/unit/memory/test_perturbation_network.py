"""Leaving examples and classes out of a small network's training, against training it again without them."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hpccl.config.curvature import ListedTasks
from hpccl.curvature.dense import DenseEstimator
from hpccl.curvature.factors import KroneckerPass
from hpccl.curvature.kfac import KroneckerEstimator
from hpccl.curvature.posterior import Posterior
from hpccl.curvature.protocols import Estimator, Examples
from hpccl.dist.comm import Comm
from hpccl.memory.perturbation import Perturbed, Variance, perturbed

CLASSES, EACH, DELTA = 5, 10, 1.0
LEFT_OUT = slice(0, None, 2)  # examples that are trained without


def data() -> tuple[Tensor, Tensor]:
    """Classes on a circle that differ in how far they spread into each other; [n, 1, 1, 2] and [n]."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(CLASSES * EACH) % CLASSES
    angle = 2 * torch.pi * labels.double() / CLASSES
    noise = torch.randn(len(labels), 2, generator=generator, dtype=torch.float64)
    spread = 0.3 + 0.1 * torch.tensor([3, 0, 4, 1, 2])[labels, None]
    points = 1.5 * torch.stack([angle.cos(), angle.sin()], dim=1) + spread * noise
    return points[:, None, None, :], labels


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, CLASSES)).double().eval()


def trained(pixels: Tensor, labels: Tensor, keep: Tensor, start: nn.Module) -> nn.Module:
    """From `start` to the minimum of the summed loss and the prior, by Newton's method with damping."""
    model = copy.deepcopy(start)
    weights = nn.utils.parameters_to_vector(model.parameters()).detach()
    shapes = {name: value.shape for name, value in model.named_parameters()}

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split([shape.numel() for shape in shapes.values()])
        named = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        logits = torch.func.functional_call(model, named, (pixels[keep],))
        return functional.cross_entropy(logits, labels[keep], reduction="sum") + 0.5 * DELTA * flat.square().sum()

    gradient, damping = torch.func.grad(loss), 1.0
    slope = gradient(weights)
    for _ in range(200):
        if float(slope.abs().max()) < 1e-7:
            break
        curvature = torch.func.jacrev(gradient)(weights)
        lowest = max(0.0, -float(torch.linalg.eigvalsh(curvature)[0]))
        step = torch.linalg.solve(curvature + (lowest + damping) * torch.eye(len(weights)).double(), slope)
        better = bool(loss(weights - step) < loss(weights))
        weights, damping = (weights - step, damping / 4) if better else (weights, 4 * damping)
        slope = gradient(weights)
    assert float(slope.abs().max()) < 1e-5
    nn.utils.vector_to_parameters(weights, model.parameters())
    return model


@dataclass(frozen=True)
class Case:
    """The network of all examples, true nats of every second without it, and of each class without all of it."""

    pixels: Tensor
    labels: Tensor
    model: nn.Module
    without: Tensor
    without_class: Tensor

    def posterior(self, estimator: Estimator, keep: Tensor) -> Posterior:
        """Of the examples that are kept."""
        head, count = torch.ones(CLASSES, dtype=torch.bool), int(keep.sum())
        batch = Examples(self.pixels[keep], self.labels[keep], head, torch.arange(count), torch.ones(count))
        precision = estimator.estimate(self.model, [batch], Comm.solo())
        weights = {name: value.detach() for name, value in self.model.named_parameters()}
        return Posterior.of(precision, weights, prior_precision=DELTA)

    def perturbed(self, estimator: Estimator) -> Perturbed:
        """With the posterior of all examples."""
        posterior = self.posterior(estimator, torch.ones(len(self.labels), dtype=torch.bool))
        variance = posterior.logit_variance(self.model, self.pixels)
        with torch.no_grad():
            return perturbed(self.model(self.pixels), self.labels, Variance.of(variance))


def nats(model: nn.Module, pixels: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        return functional.cross_entropy(model(pixels), labels, reduction="none")


@pytest.fixture(scope="module")
def case() -> Case:
    pixels, labels = data()
    places = torch.arange(len(labels))
    model = trained(pixels, labels, places >= 0, network())

    def without(gone: Tensor) -> Tensor:
        return nats(trained(pixels, labels, ~gone, model), pixels[gone], labels[gone]).mean()

    one_by_one = [without(places == number) for number in places[LEFT_OUT]]
    classes = [without(labels == number) for number in range(CLASSES)]
    return Case(pixels, labels, model, torch.stack(one_by_one), torch.stack(classes))


def spearman(one: Tensor, other: Tensor) -> float:
    ranks = [value.argsort().argsort().double() for value in (one, other)]
    return float(torch.corrcoef(torch.stack(ranks))[0, 1])


ESTIMATORS: dict[str, tuple[Estimator, float, float]] = {  # with errors of the mean, in parts of what is estimated
    "dense": (DenseEstimator(), 0.1, 0.95),
    "kronecker": (KroneckerEstimator(KroneckerPass(fisher="ggn"), ListedTasks()), 1.0, 0.85),
}


@pytest.mark.parametrize("name", [*ESTIMATORS])
def test_left_out_is_what_training_without_each_example_gives(case: Case, name: str) -> None:
    estimator, tolerance, order = ESTIMATORS[name]
    found = case.perturbed(estimator)
    learned, left_out = found.nats[LEFT_OUT], found.left_out[LEFT_OUT]
    gap = float((case.without - learned).mean())
    assert gap > 0.03
    assert float(left_out.mean()) == pytest.approx(float(case.without.mean()), abs=tolerance * gap)
    assert spearman(left_out - learned, case.without - learned) > order


def test_a_step_without_a_class_orders_classes_as_training_without_them_does(case: Case) -> None:
    """Section 5 of docs/theory.md for a group: the posterior of the others, and the gradient of those that are gone."""
    found = []
    for number in range(CLASSES):
        gone = case.labels == number
        pixels, labels = case.pixels[gone], case.labels[gone]
        named = dict(case.model.named_parameters())
        loss = functional.cross_entropy(case.model(pixels), labels, reduction="sum")
        gradient = dict(zip(named, torch.autograd.grad(loss, [*named.values()]), strict=True))
        step = case.posterior(DenseEstimator(), ~gone).solve(gradient)
        moved = {name: value.detach() + step[name] for name, value in named.items()}
        found.append(
            functional.cross_entropy(torch.func.functional_call(case.model, moved, (pixels,)), labels).detach()
        )
    assert spearman(torch.stack(found), case.without_class) > 0.7
    learned = nats(case.model, case.pixels, case.labels).mean()
    assert float(case.without_class.min()) > float(learned) + 2
    assert min(map(float, found)) > float(learned) + 1
