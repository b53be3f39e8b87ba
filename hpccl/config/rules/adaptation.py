"""What cannot be asked of a run that adapts another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from hpccl.config.adaptation import AddData, AnyAdaptation, NewModel, RemoveData
from hpccl.config.clash import Clash
from hpccl.config.prior import PriorConfig
from hpccl.config.rules.common import differs
from hpccl.config.stream import BlurryScenario, PermutedScenario, RotatedScenario

if TYPE_CHECKING:
    from hpccl.config.run import RunConfig

__all__ = ["RULES"]


def _removed(config: RunConfig) -> Iterator[Clash]:
    if isinstance(config.adapt, RemoveData) and config.prior.mixes:
        problem = (
            "gives every example a part of both labels, of which forgetting takes back one; adapt a run of examples"
        )
        yield Clash(("prior.share_of", "adapt.kind"), problem)


def _adapted(config: RunConfig) -> Iterator[Clash]:
    """Of what `hpccl adapt` writes, and of settings that are put over it."""
    adapt = config.adapt
    if not isinstance(adapt, AnyAdaptation):
        return
    if config.train.restart or config.train.only_last or config.train.first_task_from is not None:
        yield Clash(("train.restart", "adapt.kind"), "an adaptation is one task; leave restart, only_last and the like")
    if (config.train.data == "seen") != adapt.retrain:
        problem = "the reference trains on all data, an adaptation on what is new; leave it as hpccl adapt set it"
        yield Clash(("train.data", "adapt.retrain"), problem)
    if config.log.reconstruction > 0:
        problem = "compares with the gradient of earlier tasks, and an adaptation has none; set it to 0"
        yield Clash(("log.reconstruction", "adapt.kind"), problem)
    if config.train.loss == "sigmoid":
        problem = (
            "soft labels and what is taken back of them are a softmax's; adapt a run with train.loss=cross_entropy"
        )
        yield Clash(("train.loss", "adapt.kind"), problem)
    if config.train.head_epochs > 0:
        yield Clash(("train.head_epochs", "adapt.kind"), "is for new classes' rows, and there are none; set it to 0")
    if config.evaluate.classifier != "head":
        problem = "is computed when a task ends, which an adaptation does not do; set it to head"
        yield Clash(("evaluate.classifier", "adapt.kind"), problem)
    if "old_classes" in config.train.frozen:
        problem = "leaves only new classes' rows to learn, and there are none; leave old_classes out"
        yield Clash(("train.frozen", "adapt.kind"), problem)
    scenario = config.stream.scenario
    if isinstance(adapt, AddData) and isinstance(scenario, PermutedScenario | RotatedScenario | BlurryScenario):
        problem = f"{scenario.kind} tasks change or mix images, and added ones are of no task; adapt a run of others"
        yield Clash(("stream.scenario.kind", "adapt.kind"), problem)
    if adapt.retrain:
        return
    usual = PriorConfig()
    for name in ("loss", "label_weight", "scale_to_new", "distill", "correct"):
        if differs(config.prior, usual, name):
            key = f"prior.{name}" + {"distill": ".weight", "correct": ".share"}.get(name, "")
            problem = "says of the past what an adaptation does not; adapt a run of soft labels, replay or a quadratic"
            yield Clash((key, "adapt.kind"), problem)
    if config.memory.labels == "kept":
        problem = "keeps what older networks said, and adapting asks what the last one did; adapt a run that relabels"
        yield Clash(("memory.labels", "adapt.kind"), problem)
    if config.prior.fromp.weight > 0:
        problem = "couples predictions on memory, of which adaptation takes soft labels; adapt a run with soft labels"
        yield Clash(("prior.fromp.weight", "adapt.kind"), problem)
    if config.prior.topology.nodes > 0:
        problem = "keeps features in place while new classes are learned, and there are none; set it to 0"
        yield Clash(("prior.topology.nodes", "adapt.kind"), problem)
    if not config.prior.some_soft and isinstance(adapt, NewModel):
        problem = "the old network says nothing where all of the memory has true labels; adapt a run with soft labels"
        yield Clash(("prior.replay", "adapt.kind"), problem)
    if config.prior.view == "teacher" and isinstance(adapt, NewModel):
        problem = "asks the old network, which is of another kind; set it to stored or recorded"
        yield Clash(("prior.view", "adapt.kind"), problem)
    if config.prior.quadratic.weight > 0 and isinstance(adapt, NewModel):
        problem = "is about the weights of the old network; set it to 0"
        yield Clash(("prior.quadratic.weight", "adapt.kind"), problem)


RULES = (_adapted, _removed)
