"""Loss terms and speed of training steps, for the log and the display."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hpccl.data.order import BatchPlan
from hpccl.data.protocols import Task
from hpccl.prior.normal import NormalPrior
from hpccl.prior.quadratic import Quadratic
from hpccl.report.progress import Reading
from hpccl.train.normal import normal_prior
from hpccl.train.state import RunState, World
from hpccl.train.step import TERM_NAMES, StepStats

__all__ = ["Meter"]


@dataclass
class Meter:
    """Logs loss terms and speed every `log.every` steps; sums stay on the device and are all-reduced only then."""

    task: Task
    world: World
    plan: BatchPlan
    state: RunState
    normal: NormalPrior | None = field(init=False)
    terms: Tensor = field(init=False)  # in the order of TERM_NAMES, then the functional prior
    steps: int = 0
    images: int = 0
    since: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.terms = torch.zeros(len(TERM_NAMES) + 1, device=self.state.engine.device)
        self.normal = normal_prior(self.task, self.state.prior, self.world)

    def update(self, done: int, images: int, stats: StepStats) -> None:
        """Add a step's figures, after `done` steps of the task; write and reset them when due."""
        self.terms += torch.cat([stats.terms, stats.functional[None]])
        self.steps += 1
        self.images += images
        if done % self.world.config.log.every and done != self.plan.num_steps:
            return
        self._write(done, stats)
        self.terms.zero_()
        self.steps, self.images, self.since = 0, 0, time.perf_counter()

    def _write(self, done: int, stats: StepStats) -> None:
        prior, normal = self.state.prior, self.normal
        of_weights = [self._value(prior.quadratic), self._value(normal)]
        terms = torch.cat([self.terms / self.steps, self.terms.new_tensor(of_weights)])
        self.world.comm.sum_([terms])
        names = (*TERM_NAMES, "functional", "quadratic", "normal")
        named = {name: float(value) for name, value in zip(names, terms, strict=True)}
        for name, part in (("functional", prior.fromp), ("quadratic", prior.quadratic), ("normal", normal)):
            if part is None:
                del named[name]
        if self.world.config.prior.distill.weight == 0:
            del named["distill"]
        if self.world.config.prior.topology.nodes == 0:
            del named["anchor"], named["minmax"]
        speed = self.images / (time.perf_counter() - self.since)
        left = (self.plan.num_steps - done) * self.plan.batch_size / speed
        epoch = done / self.plan.steps_per_epoch
        self.world.log.write(
            "step",
            task=self.task.index,
            step=done,
            num_steps=self.plan.num_steps,
            epoch=epoch,
            loss=sum(named.values()),
            terms=named,
            lr=self.state.engine.lr,
            gradient_norm=float(stats.gradient_norm),
            images_per_second=speed,
            eta_seconds=left,
        )
        shown = {"loss": sum(named.values()), **named}
        self.world.progress.update(Reading(done, epoch, shown, speed, left))

    def _value(self, part: Quadratic | NormalPrior | None) -> float:
        """Return this rank's share of the value of a prior on weights, per training example."""
        if part is None:
            return 0.0
        engine, learned = self.state.engine, self.state.engine.like.keys()
        weights = {name: leaf for name, leaf in engine.gather().items() if name in learned}
        return part.value(weights, self.world.comm) / self.plan.num_train
