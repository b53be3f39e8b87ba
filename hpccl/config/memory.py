"""Examples of past tasks that are kept: how many, which, and how they are mixed with new ones."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from hpccl.config.base import Fraction, NonNegativeInt, PositiveFloat, PositiveInt, Section

__all__ = [
    "NAMED_SELECTORS",
    "SELECTORS",
    "FeatureSelector",
    "GreedySelector",
    "MemoryConfig",
    "NaturalMix",
    "PosteriorSelector",
    "ReconstructionSelector",
    "ReservoirSelector",
    "ScoreSelector",
    "SelectorConfig",
    "StratifiedMix",
    "UniformSelector",
]


class NaturalMix(Section):
    """Shuffle the union of the task and the memory: every example once an epoch."""

    kind: Literal["natural"] = "natural"


class StratifiedMix(Section):
    """A fixed share of memory rows in every step, weighted so that the expected objective stays the same."""

    kind: Literal["stratified"] = "stratified"
    share: Annotated[float, Field(gt=0, lt=1)] = 0.5  # of a step's rows


class UniformSelector(Section):
    """A uniform sample of the task, without replacement: the smallest hashes of (seed, task, example)."""

    kind: Literal["uniform"] = "uniform"


class ReservoirSelector(Section):
    """The smallest hashes of (seed, example). With memory.total: a uniform sample of all that was ever seen."""

    kind: Literal["reservoir"] = "reservoir"


class GreedySelector(Section):
    """One example after the other: kept if its class has fewer than its share, in place of one of the largest class.

    GDumb's sampler (Prabhu et al. 2020), over the task's examples in a random order. With memory.total: over all that
    was ever seen.
    """

    kind: Literal["greedy"] = "greedy"


class ScoreSelector(Section):
    """The largest scores of the network that ends the task, among the classes that compete.

    gini: 1 - sum p^2 (FROMP's lambda); error: -log p of the true label, nats; residual: |p - y|^2 (K-priors).
    """

    kind: Literal["gini", "error", "residual"]
    sampled: bool = False  # draw with probabilities that grow with the score, and weigh by them


class PosteriorSelector(Section):
    """The largest scores of the Laplace posterior on the task: of the last layer, as one Kronecker product, or of all.

    leverage: tr(Lambda_i v_i), v_i the variance of the logits; sensitivity: sum_c |lambda_ic v_ic e_ic|, e = p - y
    (memory perturbation).
    """

    kind: Literal["leverage", "sensitivity"]
    sampled: bool = False  # draw with probabilities that grow with the score, and weigh by them
    prior_precision: PositiveFloat = 1.0  # of the weights' normal prior
    # whose weights are uncertain: last_layer: those of the last; all: a Kronecker product a layer, and as many backward
    # passes for every example of the task as classes compete
    network: Literal["last_layer", "all"] = "last_layer"


class FeatureSelector(Section):
    """Greedily by class, from what the last layer sees.

    herding: the running mean of normalised features stays closest to the class's (iCaRL); welling: the order of the
    code that iCaRL's authors released; k_center: always the example that is farthest from those chosen.
    """

    kind: Literal["herding", "welling", "k_center"]


class ReconstructionSelector(Section):
    """Greedily by class: the mean, or a weighted sum, of the last layer's gradients comes close to the task's.

    Gradients are those at the weights that end the task and at `probes` random steps of the last layer from them, less
    what a quadratic says of these steps if the prior has one; in a random projection.
    """

    kind: Literal["reconstruction"] = "reconstruction"
    probes: NonNegativeInt = 4  # random steps of the last layer
    radius: PositiveFloat = 1.0  # standard deviation of the change of a logit by such a step
    projection: PositiveInt = 512  # numbers that stand for a gradient
    # equal: all count 1, and their mean comes close to the task's, whose size is left to prior.weight; fitted: every
    # example has the weight that brings the weighted sum closest; new tasks were learned far worse (docs/results.md)
    weights: Literal["equal", "fitted"] = "equal"
    ridge: PositiveFloat = 0.01  # pull of fitted weights to equal ones


SelectorConfig = Annotated[
    UniformSelector
    | ReservoirSelector
    | GreedySelector
    | ScoreSelector
    | PosteriorSelector
    | FeatureSelector
    | ReconstructionSelector,
    Field(discriminator="kind"),
]


# Kinds that choose within a task, in the order of the union above; a reservoir is a uniform sample there.
_SELECTORS = (UniformSelector, ScoreSelector, PosteriorSelector, FeatureSelector, ReconstructionSelector)
SELECTORS: tuple[str, ...] = tuple(
    kind for each in _SELECTORS for kind in get_args(each.model_fields["kind"].annotation)
)
_VARIANTS: dict[str, dict[str, Any]] = {"sampled": {"sampled": True}, "fitted": {"weights": "fitted"}}
# By name (a kind, or one and a variant of it: `gini+sampled`, `reconstruction+fitted`), the keys of `memory.selector`.
NAMED_SELECTORS: dict[str, dict[str, Any]] = {kind: {"kind": kind} for kind in SELECTORS} | {
    f"{kind}+{variant}": {"kind": kind, **keys}
    for variant, keys in _VARIANTS.items()
    for each in _SELECTORS
    if keys.keys() <= each.model_fields.keys()
    for kind in get_args(each.model_fields["kind"].annotation)
}


class MemoryConfig(Section):
    """Examples of past tasks that are kept. Their number is `size`, `total` or `fraction`."""

    size: NonNegativeInt = 0  # examples kept of each task
    total: NonNegativeInt = 0  # examples kept of all tasks together; earlier tasks give up theirs as more come
    fraction: Fraction = 0.0  # share of each task's examples that is kept
    selector: SelectorConfig = UniformSelector()  # which examples are kept
    balanced: bool = True  # equally many of each class
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"  # of stored soft labels
    # renewed: soft labels are the newest network's; kept: those of the network that ended the example's own task (DER)
    labels: Literal["renewed", "kept"] = "renewed"
    mix: Annotated[NaturalMix | StratifiedMix, Field(discriminator="kind")] = NaturalMix()  # of new and memory rows
    # of the images: reference: they stay in the stream's shards; copy: they are copied to the run folder, byte by byte,
    # and the training shards of finished tasks may be removed
    keep: Literal["reference", "copy"] = "reference"

    @property
    def kept(self) -> bool:
        """Whether there is a memory."""
        return self.size > 0 or self.total > 0 or self.fraction > 0
