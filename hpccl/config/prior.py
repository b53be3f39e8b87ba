"""Terms of the objective for past tasks, while a new one is learned."""

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
    """weight/2 (w - anchor)' (F + damping) (w - anchor), with F summed over the examples that are not in memory."""

    weight: NonNegativeFloat = 0.0  # lambda; 1 is the untempered value; 0: off
    damping: NonNegativeFloat = 1e-3  # delta: added to the diagonal of F
    # products with Kronecker factors or eigenbases in a step; bf16: differences, sums and stored factors stay fp32
    products: Literal["fp32", "bf16"] = "fp32"
    # newest: one quadratic around the newest weights; each: every task's own around the weights at its end
    anchor: Literal["newest", "each"] = "newest"
    # factor on the curvature of all earlier tasks when a task ends; below 1: online EWC (Schwarz et al. 2018)
    decay: Annotated[float, Field(gt=0, le=1)] = 1.0


class NormalConfig(Section):
    """The weights' normal prior N(0, 1/precision): precision/2 |w|^2, added to the nats of all examples.

    After the first task it is weight * precision/2 |w - w*|^2 around the newest weights w*, the weight divergence of
    K-priors (Khan and Swaroop 2021). If training uses all data of the past again, it stays around 0.
    """

    precision: NonNegativeFloat = 0.0  # delta, in nats per squared weight, the same for every trainable weight; 0: off
    weight: NonNegativeFloat = 1.0  # tau: factor on the pull to the newest weights


class FrompConfig(Section):
    """weight/2 sum over past tasks and classes of (m - m_old)' K^-1 (m - m_old), m probabilities on memory.

    The functional regularisation of FROMP (Pan et al. 2020). It replaces soft labels and replay; `curvature` is then
    measured on all examples of a task, including those in memory.
    """

    weight: NonNegativeFloat = 0.0  # the published code's tau times the number of examples of the task; 0: off
    # posterior: K = J (F + precision)^-1 J' + jitter, with F the curvature of all past tasks; identity: K = 1
    kernel: Literal["posterior", "identity"] = "posterior"
    precision: PositiveFloat = 1e-3  # delta: prior precision of the posterior
    jitter: PositiveFloat = 1e-5  # added to K's diagonal; raised tenfold, repeatedly, if rounding makes K indefinite
    # number of examples of a past task that a step recalls and couples by K, in turn; null: all of them
    block: PositiveInt | None = None


class DistillConfig(Section):
    """Distillation from the previous network on a task's images, beside their labels (LwF; Li and Hoiem 2016).

    One row for each old head (train.head=own), or one over all old classes (train.head=seen); one sigmoid per class
    with train.loss=sigmoid.
    """

    weight: NonNegativeFloat = 0.0  # lambda_o: weight of each of these rows; 0: off
    temperature: PositiveFloat = 2.0  # divides the logits of both networks
    scale_t2: bool = False  # multiply by temperature^2, so that gradients do not shrink as it grows
    # recorded: logits of the evaluation view, computed as the task begins; same: of the student's view, in each step
    view: Literal["recorded", "same"] = "recorded"
    images: Literal["new", "all"] = "new"  # new: the task's images; all: also memory's images
    # fixed: labels have weight 1; classes: labels m / (n + m), distillation weight * n / (n + m), with n old and m new
    # classes (BiC)
    balance: Literal["fixed", "classes"] = "fixed"


class CorrectConfig(Section):
    """A scale and an offset that correct the bias of the newest classes' logits (BiC; Wu et al. 2019).

    They are fitted after the training on a task, to examples that no network learns from: equally many of every class,
    held out of the task and counted in memory.total.
    """

    share: Annotated[float, Field(ge=0, lt=1)] = 0.0  # share of memory.total that is held out for it; 0: no correction
    # weight of beta^2 / 2 (beta: the offset), added to the mean nats; 0: a best beta may not exist
    penalty: NonNegativeFloat = 0.1


class TopologyConfig(Section):
    """A neural gas over the features of the first task, whose nodes later tasks keep in place (TOPIC; Tao et al. 2020).

    Adds anchor * mean anchor loss of old nodes + minmax * mean min-max loss of new examples: see docs/methods.md.
    """

    nodes: NonNegativeInt = 0  # nodes of the first task (400 in the paper); 0: off
    new_nodes: PositiveInt = 1  # nodes of each later class; fewer than its examples
    passes: PositiveInt = 1  # passes over the first task's examples
    rate: Annotated[float, Field(gt=0, le=1)] = 0.02  # learning rate of the neural gas
    spread: PositiveFloat = 10.0  # alpha of the neural gas: nodes of rank i move by exp(-i / spread)
    first_rank: Literal[0, 1] = 1  # rank of the nearest node
    lifetime: PositiveInt = 200  # age beyond which an edge is removed
    normalised: bool = True  # scale features to norm 1
    anchor: NonNegativeFloat = 0.5  # lambda_1: weight of the anchor loss
    minmax: NonNegativeFloat = 0.005  # lambda_2: weight of the min-max loss
    margin: PositiveFloat | None = None  # xi: distance that rivals are pushed to; null: the largest between two nodes
    # where the features of old nodes' images should stay: at the node, or where they are in the last network
    target: Literal["centroid", "image"] = "centroid"
    floor: PositiveFloat = 0.1  # added to variances, in multiples of the mean variance of features


class PriorConfig(Section):
    """Terms of the objective for past tasks, while a new one is learned."""

    quadratic: QuadraticConfig = QuadraticConfig()  # quadratic term (EWC)
    normal: NormalConfig = NormalConfig()  # normal prior of the weights; with soft-labelled memory: K-priors
    fromp: FrompConfig = FrompConfig()  # coupled predictions on memory (FROMP)
    weight: FloatPerTask = (1.0,)  # tau: weight of a memory example; one value, or one per task that it comes from
    scale_to_task: bool = False  # multiply tau by N_s / m: memory stands for its whole task
    scale_to_new: bool = False  # multiply tau by N_t / M: all memory counts as much as the new task (ER, DER)
    # share of memory with true labels; the rest has the old network's soft labels. coverage: for each task, the share
    # of its examples that memory keeps
    replay: Fraction | Literal["coverage"] = 0.0
    # what `replay` is a share of. examples: some have true labels, the others soft ones; labels: every example has
    # both, its true label with this share of its weight: the mean over all ways to choose the examples
    share_of: Literal["examples", "labels"] = "examples"
    # beta: weight, instead of tau, of the true labels that soft-labelled memory has in addition (DER++); 0: none
    label_weight: NonNegativeFloat = 0.0
    # loss of soft labels: cross-entropy of probabilities, or squared differences of logits, averaged over classes (DER)
    loss: Literal["cross_entropy", "squared"] = "cross_entropy"
    temperature: PositiveFloat = 1.0  # temperature of the soft labels
    # which classes compete in rows with soft labels (cross_entropy) and in FROMP's predictions. seen: the same as in
    # rows with true labels, where later classes have target 0, as in the past's own loss; known: only those that the
    # old network knew. With train.head=own there is no difference
    classes: Literal["seen", "known"] = "seen"
    # stored: label and student on the evaluation view; teacher: the old network labels the student's view;
    # recorded: label of the evaluation view, student on a fresh view (like the published code)
    view: Literal["stored", "teacher", "recorded"] = "stored"
    distill: DistillConfig = DistillConfig()  # distillation from the previous network (LwF)
    correct: CorrectConfig = CorrectConfig()  # correction of the newest classes' logits (BiC)
    topology: TopologyConfig = TopologyConfig()  # neural gas over features (TOPIC)

    @property
    def some_true(self) -> bool:
        """Whether examples in memory may have true labels (replay)."""
        return self.replay != 0

    @property
    def some_soft(self) -> bool:
        """Whether examples in memory may have soft labels."""
        return self.replay != 1

    @property
    def mixes(self) -> bool:
        """Whether every example in memory has both labels, each with a share of its weight."""
        return self.share_of == "labels" and self.some_true and self.some_soft

    @property
    def stands_alone(self) -> bool:
        """Whether an example in memory stands for itself only, since the quadratic has the others of its task."""
        return self.quadratic.weight > 0 and not self.scale_to_task

    def true_share(self, kept: int, num_train: int) -> float:
        """Share of true labels for a task with `num_train` training examples, of which memory keeps `kept`."""
        return kept / max(num_train, 1) if self.replay == "coverage" else self.replay

    def num_replayed(self, kept: int, num_train: int) -> int:
        """How many of `kept` examples of a task with `num_train` training examples have true labels alone."""
        if self.mixes:
            return 0
        if self.replay == "coverage":
            return kept * kept // max(num_train, 1)
        return int(self.replay * kept + 1e-9)  # 0.29 * 100 < 29
