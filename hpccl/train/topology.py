"""TOPIC in a run: the neural gas is fitted as the first task ends, grows as a session begins, and settles as it ends.

While a session is learned the net does not change, so that a step is a function of its counters and checkpoints hold
the whole state. Every rank has the same net: all ranks compute features, gather them, and each fits the net.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hpccl.config.prior import TopologyConfig
from hpccl.data.order import permutation
from hpccl.data.protocols import Task, training_samples
from hpccl.data.rows import ANCHOR, PULL, PUSH, FeatureRows
from hpccl.memory.gas import Gas, Rules
from hpccl.memory.means import normalised
from hpccl.train.end_of_task import featuring
from hpccl.train.passes import answers
from hpccl.train.state import RunState, World

__all__ = ["ASKED_BY", "Topology", "begin_session", "end_session"]

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
ASKED_BY = "prior.topology.nodes"
# Purposes of hashes (numbers differ from those in hpccl.data and consolidate).
_START, _ORDER = 111, 112


def begin_session(task: Task, state: RunState, world: World) -> None:
    """Add nodes for the new classes to the net, at features of the last task's network; collective.

    Raises:
        Stopped: the run was asked to stop; nothing was changed.
    """
    gas, config = state.prior.gas, world.config.prior.topology
    if gas is None:
        return
    with world.phase(task, "topology") as phase:
        features, samples = _features(training_samples(task), state, world)
        phase.images = len(samples)
        labels = world.stream.labels("train")[samples]
        grown = gas.grown(features, samples, labels, _rules(config), each=config.new_nodes, floor=config.floor)
    state.prior = replace(state.prior, gas=grown)


def end_session(task: Task, state: RunState, world: World) -> Gas | None:
    """Return the net after a task; None without a topology. Collective.

    Raises:
        Stopped: the run was asked to stop.
    """
    config, gas = world.config.prior.topology, state.prior.gas
    if config.nodes == 0:
        return None
    rules, floor = _rules(config), config.floor
    with world.phase(task, "topology", part=1) as phase:
        features, samples = _features(training_samples(task), state, world)
        phase.images = len(samples)
        labels = world.stream.labels("train")[samples]
        if gas is None:
            seed, count = world.config.seed, len(samples)
            found = Gas.of(
                features,
                samples,
                labels,
                rules,
                start=np.sort(permutation(count, seed, _START)[: config.nodes]),
                orders=[permutation(count, seed, _ORDER, number) for number in range(config.passes)],
                floor=floor,
            )
        else:
            order = permutation(len(samples), world.config.seed, _ORDER, task.index)
            found = gas.settled(features[order], labels[order], _images(gas, state, world), rules, floor=floor)
    world.log.write(
        "topology",
        task=task.index,
        nodes=len(found),
        edges=int((found.ages > 0).sum()) // 2,
        diameter=found.diameter,
        bytes=sum(value.numel() * value.element_size() for value in vars(found).values() if isinstance(value, Tensor)),
    )
    return found


def _rules(config: TopologyConfig) -> Rules:
    return Rules(config.rate, config.spread, config.lifetime, config.first_rank)


def _features(samples: Ints, state: RunState, world: World) -> tuple[Floats, Ints]:
    """Return features [n, d] of evaluation views and sample positions [n] of the decodable images, on every rank."""
    found, valid = _all_features(samples, state, world)
    return found[valid], samples[valid]


def _images(gas: Gas, state: RunState, world: World) -> Floats:
    """Return the present network's features [N, d] of the images that represent the nodes."""
    found, _ = _all_features(gas.sample.numpy(), state, world)
    return found


def _all_features(samples: Ints, state: RunState, world: World) -> tuple[Floats, npt.NDArray[np.bool_]]:
    found: list[Tensor] = []
    valid = [torch.zeros(0, dtype=torch.int64)]
    with featuring(state, world, asked_by=ASKED_BY) as features:
        for _, points, readable in answers(features, samples, world):
            found.append(points.double().cpu())
            valid.append(readable.long().cpu())
    every, usable = world.comm.gather(torch.cat(found)), world.comm.gather(torch.cat(valid))
    if world.config.prior.topology.normalised:
        every = normalised(every)
    return every.numpy(), usable.numpy() > 0


@dataclass(frozen=True)
class Topology:
    """The net's losses on features while one session is learned.

    gas: as the session began; layer: name of the last layer; margin: xi
    """

    config: TopologyConfig
    gas: Gas
    layer: str
    margin: float

    @classmethod
    def of(cls, gas: Gas | None, config: TopologyConfig, layer: str) -> Topology | None:
        """Set up the losses of a session; None where there is no net yet."""
        return None if gas is None else cls(config, gas, layer, config.margin or gas.diameter)

    @property
    def anchors(self) -> Ints:
        """The training examples [A] that represent old nodes, shown in every step; none if their weight is 0."""
        return self.gas.sample.numpy()[: self.gas.old if self.config.anchor else 0]

    def rows(self, sample: Tensor, new: Tensor, anchors: Ints, valid: Tensor, *, batch: int) -> FeatureRows:
        """Return the rows on features of a micro-batch's images.

        sample: [p] of its rows; new: [p] bool, rows of the session's examples that are no fillers
        anchors: [a] positions in `self.anchors`, whose images follow; valid: [p + a] bool, could be decoded
        batch: rows of the whole step
        """
        parts = [self._anchored(anchors, first=len(sample))]
        if self.config.minmax:
            parts += [
                self._near(position, int(sample[position]), batch) for position in new.nonzero().flatten().tolist()
            ]
        joined = [torch.cat([part[column] for part in parts]) for column in range(6)]
        image, target, weight, kind, stiff, margin = joined
        weight = weight * valid.to(weight.device)[image]
        return FeatureRows(
            image=image,
            target=target.float(),
            weight=weight.float(),
            kind=kind,
            stiff=stiff.float(),
            margin=margin.float(),
            layer=self.layer,
            normalised=self.config.normalised,
        )

    def _anchored(self, anchors: Ints, *, first: int) -> tuple[Tensor, ...]:
        nodes = torch.from_numpy(anchors)
        place = self.gas.nodes if self.config.target == "centroid" else self.gas.image
        share = self.config.anchor / max(self.gas.old, 1)
        count = len(nodes)
        return (
            first + torch.arange(count),
            place[nodes],
            torch.full((count,), share, dtype=torch.float64),
            torch.full((count,), ANCHOR),
            1 / self.gas.variance[nodes],
            torch.zeros(count, dtype=torch.float64),
        )

    def _near(self, position: int, sample: int, batch: int) -> tuple[Tensor, ...]:
        """Pull an example to its node and, if it represents a node, push it from the node's rivals."""
        gas = self.gas
        mine = (gas.shot == sample).nonzero().flatten()
        pulled = gas.shot_node[mine]
        own = (gas.sample[gas.old :] == sample).nonzero().flatten() + gas.old
        rivals = torch.cat([torch.zeros(0, dtype=torch.int64), *(gas.rivals(int(node)) for node in own)])
        nodes = torch.cat([pulled, rivals])
        count, pushed = len(nodes), torch.arange(len(nodes)) >= len(pulled)
        return (
            torch.full((count,), position),
            gas.nodes[nodes],
            torch.full((count,), self.config.minmax / batch, dtype=torch.float64),
            torch.where(pushed, PUSH, PULL),
            torch.zeros(count, gas.nodes.shape[1], dtype=torch.float64),
            pushed * self.margin,
        )
