"""The memory: how many examples of past tasks are kept, which ones, and how they are mixed with new ones."""

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
    """The union of the task and the memory is shuffled; every example is used once per epoch."""

    kind: Literal["natural"] = "natural"


class StratifiedMix(Section):
    """A fixed share of memory rows in every step, weighted so that the expected objective stays the same."""

    kind: Literal["stratified"] = "stratified"
    share: Annotated[float, Field(gt=0, lt=1)] = 0.5  # share of memory in a step's rows


class UniformSelector(Section):
    """A uniform sample of the task, without replacement: the smallest hashes of (seed, task, example)."""

    kind: Literal["uniform"] = "uniform"


class ReservoirSelector(Section):
    """The smallest hashes of (seed, example). With memory.total: a uniform sample of all examples seen."""

    kind: Literal["reservoir"] = "reservoir"


class GreedySelector(Section):
    """An example is kept if its class has fewer than its share; in a full memory it replaces one of the largest class.

    GDumb's sampler (Prabhu et al. 2020), over the task's examples in random order. With memory.total: over all examples
    seen.
    """

    kind: Literal["greedy"] = "greedy"


class ScoreSelector(Section):
    """The examples with the largest scores, from the network that ends the task and its competing classes.

    gini: 1 - sum p^2 (FROMP's lambda); error: -log p of the true label, in nats; residual: |p - y|^2 (K-priors).
    """

    kind: Literal["gini", "error", "residual"]
    sampled: bool = False  # draw with probabilities that grow with the score, and correct for it by weights


class PosteriorSelector(Section):
    """The examples with the largest scores, from the Laplace posterior of the task.

    leverage: tr(Lambda_i v_i), v_i the variance of the logits; sensitivity: sum_c |lambda_ic v_ic e_ic|, e = p - y
    (memory perturbation).
    """

    kind: Literal["leverage", "sensitivity"]
    sampled: bool = False  # draw with probabilities that grow with the score, and correct for it by weights
    prior_precision: PositiveFloat = 1.0  # precision of the weights' normal prior
    # layers of the posterior. last_layer: the last one, as one Kronecker product; all: one Kronecker product per layer,
    # with as many backward passes per example of the task as classes compete
    network: Literal["last_layer", "all"] = "last_layer"


class FeatureSelector(Section):
    """Examples are chosen greedily by class, from the inputs of the last layer (features).

    herding: the running mean of normalised features stays closest to that of the class (iCaRL); welling: the order of
    the code that iCaRL's authors released; k_center: always the example that is farthest from those chosen.
    """

    kind: Literal["herding", "welling", "k_center"]


class ReconstructionSelector(Section):
    """Examples are chosen greedily by class, so that their last-layer gradients approximate those of the whole task.

    Gradients are taken at the weights that end the task and after `probes` random steps of the last layer from there,
    minus those of the quadratic if the prior has one, and are randomly projected.
    """

    kind: Literal["reconstruction"] = "reconstruction"
    probes: NonNegativeInt = 4  # number of random steps of the last layer
    radius: PositiveFloat = 1.0  # standard deviation of the change of a logit in such a step
    projection: PositiveInt = 512  # numbers of a projected gradient
    # equal: every example has weight 1 and their mean approximates that of the task; prior.weight sets how much memory
    # counts; fitted: weights that bring the weighted sum closest; new tasks were learned far worse (docs/results.md)
    weights: Literal["equal", "fitted"] = "equal"
    ridge: PositiveFloat = 0.01  # strength of the pull of fitted weights to equal ones


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
# By name (a kind, or a kind and a variant: `gini+sampled`, `reconstruction+fitted`), the keys of `memory.selector`.
NAMED_SELECTORS: dict[str, dict[str, Any]] = {kind: {"kind": kind} for kind in SELECTORS} | {
    f"{kind}+{variant}": {"kind": kind, **keys}
    for variant, keys in _VARIANTS.items()
    for each in _SELECTORS
    if keys.keys() <= each.model_fields.keys()
    for kind in get_args(each.model_fields["kind"].annotation)
}


class MemoryConfig(Section):
    """Examples of past tasks that are kept. `size`, `total` or `fraction` sets their number."""

    size: NonNegativeInt = 0  # examples kept of each task
    total: NonNegativeInt = 0  # examples kept of all tasks together; earlier tasks give up examples as more tasks come
    fraction: Fraction = 0.0  # share of each task's examples that is kept
    selector: SelectorConfig = UniformSelector()  # which examples are kept
    balanced: bool = True  # keep equally many of each class
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"  # data type of stored soft labels
    # renewed: soft labels are those of the newest network; kept: of the network at the end of the example's task (DER)
    labels: Literal["renewed", "kept"] = "renewed"
    # how new and memory rows are mixed
    mix: Annotated[NaturalMix | StratifiedMix, Field(discriminator="kind")] = NaturalMix()
    # images of the memory. reference: they stay in the stream's shards; copy: they are copied byte by byte to the run
    # folder, and the training shards of finished tasks may be removed
    keep: Literal["reference", "copy"] = "reference"

    @property
    def kept(self) -> bool:
        """Whether there is a memory."""
        return self.size > 0 or self.total > 0 or self.fraction > 0
