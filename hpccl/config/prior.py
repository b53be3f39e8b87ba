"""What the past says while a new task is learned."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from hpccl.config.base import (
    FloatPerTask,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
)

__all__ = [
    "CorrectConfig",
    "DistillConfig",
    "FrompConfig",
    "NormalConfig",
    "PriorConfig",
    "QuadraticConfig",
    "TopologyConfig",
]


class QuadraticConfig(Section):
    """weight/2 (w - anchor)' (F + damping) (w - anchor), F summed over the examples that are not in memory."""

    weight: NonNegativeFloat = 0.0  # lambda; 1 is the un-tempered value
    damping: NonNegativeFloat = 1e-3  # delta
    # of a step with Kronecker factors or eigenbases; bf16: differences, sums and what is kept stay fp32
    products: Literal["fp32", "bf16"] = "fp32"
    # newest: one quadratic around the newest weights; each: every task's own around the weights at its end
    anchor: Literal["newest", "each"] = "newest"
    # what is left of all earlier tasks' curvature when one ends; below 1: online EWC (Schwarz et al. 2018)
    decay: Annotated[float, Field(gt=0, le=1)] = 1.0


class NormalConfig(Section):
    """The weights' normal prior N(0, 1/precision): precision/2 |w|^2 beside the nats of all examples.

    After the first task it is weight * precision/2 |w - w*|^2 around the newest weights w*, the divergence of weights
    of K-priors (Khan and Swaroop 2021); where all the past is trained on again, it stays around 0.
    """

    precision: NonNegativeFloat = 0.0  # delta, nats per squared weight, of every trainable weight alike
    weight: NonNegativeFloat = 1.0  # tau of the pull to the newest weights


class FrompConfig(Section):
    """weight/2 sum over past tasks and classes of (m - m_old)' K^-1 (m - m_old), m the probabilities of memory.

    The functional regularisation of FROMP (Pan et al. 2020). It takes the place of soft labels and replay; `curvature`
    is then measured on all examples of a task, memory included.
    """

    weight: NonNegativeFloat = 0.0  # the published code's tau, times the task's examples; 0: no such term
    # posterior: K = J (F + precision)^-1 J' + jitter, F the curvature of all past tasks; identity: K = 1
    kernel: Literal["posterior", "identity"] = "posterior"
    precision: PositiveFloat = 1e-3  # delta of the posterior
    jitter: PositiveFloat = 1e-5  # on K's diagonal; ten times as much, and again, where rounding asks for it
    # examples of a past task that are recalled in a step and coupled by K, in turn; null: all of them
    block: PositiveInt | None = None


class DistillConfig(Section):
    """What the previous network says of a task's images, beside their labels (LwF; Li and Hoiem 2016).

    One row for each old head (train.head=own), or one over all old classes (seen); a sigmoid a class where train.loss
    says so.
    """

    weight: NonNegativeFloat = 0.0  # lambda_o, of every old head's row; 0: off
    temperature: PositiveFloat = 2.0  # divides the logits of both networks
    scale_t2: bool = False  # multiply by temperature^2, so that gradients do not shrink with it
    # recorded: of the evaluation view, once as the task begins; same: of the student's view, in every step
    view: Literal["recorded", "same"] = "recorded"
    images: Literal["new", "all"] = "new"  # all: of memory's images, too
    # fixed: labels count 1 beside it; classes: weight * n / (n + m) and m / (n + m), of n old and m new classes (BiC)
    balance: Literal["fixed", "classes"] = "fixed"


class CorrectConfig(Section):
    """Two numbers that take back what the newest classes' logits have too much of (BiC; Wu et al. 2019).

    They are fitted, when training on a task has ended, to examples that no network ever learned from: equally many of
    every class, out of memory.total, and held out of the task.
    """

    share: Annotated[float, Field(ge=0, lt=1)] = 0.0  # of memory.total that is held out for it; 0: no correction
    penalty: NonNegativeFloat = 0.1  # of beta^2 / 2, beside the mean nats; 0: there may be no best beta


class TopologyConfig(Section):
    """A neural gas over the features of the first task, whose nodes later tasks keep in place (TOPIC: Tao et al. 2020).

    anchor * mean over old nodes of AL + minmax * mean over new examples of MML, see docs/methods.md.
    """

    nodes: NonNegativeInt = 0  # nodes of the first task (400 in the paper); 0: no topology
    new_nodes: PositiveInt = 1  # nodes of each later class; fewer than its examples
    passes: PositiveInt = 1  # over the first task's examples
    rate: Annotated[float, Field(gt=0, le=1)] = 0.02  # of neural gas
    spread: PositiveFloat = 10.0  # alpha of neural gas: nodes of rank i move by exp(-i / spread)
    first_rank: Literal[0, 1] = 1  # rank of the nearest node
    lifetime: PositiveInt = 200  # age beyond which an edge goes
    normalised: bool = True  # features at norm 1
    anchor: NonNegativeFloat = 0.5  # lambda_1, of the anchor loss
    minmax: NonNegativeFloat = 0.005  # lambda_2, of the min-max loss
    margin: PositiveFloat | None = None  # xi, distance that rivals are pushed to; null: the largest one of two nodes
    # where the images of old nodes should stay: at the node, or where the last network saw them
    target: Literal["centroid", "image"] = "centroid"
    floor: PositiveFloat = 0.1  # added to variances, in multiples of the mean variance of features


class PriorConfig(Section):
    """What the past says while a new task is learned."""

    quadratic: QuadraticConfig = QuadraticConfig()  # EWC
    normal: NormalConfig = NormalConfig()  # of the weights; with soft-labelled memory, K-priors
    fromp: FrompConfig = FrompConfig()  # coupled predictions on memory
    weight: FloatPerTask = (1.0,)  # tau of a memory example, by the task it comes from
    scale_to_task: bool = False  # tau * N_s / m: memory stands for its whole task
    scale_to_new: bool = False  # tau * N_t / M: all memory together counts as much as the new task (ER, DER)
    # share of memory with true labels; the rest has the old model's soft labels. coverage: of each task, the share of
    # its examples that memory keeps
    replay: Fraction | Literal["coverage"] = 0.0
    # what the share is of. examples: some have true labels, others soft ones; labels: every example has both, its true
    # label with this share of its weight: the mean over all ways to choose the examples
    share_of: Literal["examples", "labels"] = "examples"
    # beta, in tau's place: soft-labelled memory also speaks by its true labels, with this weight (DER++)
    label_weight: NonNegativeFloat = 0.0
    # of soft labels: of probabilities; or squared differences of logits, their mean over classes (DER)
    loss: Literal["cross_entropy", "squared"] = "cross_entropy"
    temperature: PositiveFloat = 1.0  # of the soft labels
    # which classes compete in rows with soft labels (cross_entropy) and in FROMP's predictions: seen: those of rows
    # with true labels, classes that came later with target 0, as the past's own loss has it; known: only those that the
    # old network knew. With train.head=own there is no difference
    classes: Literal["seen", "known"] = "seen"
    # stored: student and label on one stored view; teacher: the old model labels the student's view;
    # recorded: label of the stored view, student on a fresh view (the published code)
    view: Literal["stored", "teacher", "recorded"] = "stored"
    distill: DistillConfig = DistillConfig()  # the previous network on the task's own images
    correct: CorrectConfig = CorrectConfig()  # of the logits of the newest classes
    topology: TopologyConfig = TopologyConfig()  # a net of nodes over features

    @property
    def some_true(self) -> bool:
        """Whether examples in memory may speak by their true labels (replay)."""
        return self.replay != 0

    @property
    def some_soft(self) -> bool:
        """Whether examples in memory may speak by soft labels."""
        return self.replay != 1

    @property
    def mixes(self) -> bool:
        """Whether every example in memory speaks by both of its labels, in shares."""
        return self.share_of == "labels" and self.some_true and self.some_soft

    def true_share(self, kept: int, num_train: int) -> float:
        """Share of true labels, of a task with `num_train` training examples of which memory keeps `kept`."""
        return kept / max(num_train, 1) if self.replay == "coverage" else self.replay

    def num_replayed(self, kept: int, num_train: int) -> int:
        """Of `kept` examples of a task with `num_train` training examples, those with true labels alone."""
        if self.mixes:
            return 0
        if self.replay == "coverage":
            return kept * kept // max(num_train, 1)
        return int(self.replay * kept + 1e-9)  # 0.29 * 100 < 29
