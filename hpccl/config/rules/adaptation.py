"""What is refused in a run that adapts another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from hpccl.config.adaptation import AddData, AnyAdaptation, NewModel, RemoveData
from hpccl.config.clash import Clash
from hpccl.config.curvature import MasCurvature, SiCurvature
from hpccl.config.prior import PriorConfig
from hpccl.config.rules.common import differs
from hpccl.config.stream import BlurryScenario, PermutedScenario, RotatedScenario

if TYPE_CHECKING:
    from hpccl.config.run import RunConfig

__all__ = ["RULES"]


def _removed(config: RunConfig) -> Iterator[Clash]:
    if isinstance(config.adapt, RemoveData) and config.prior.mixes:
        problem = "gives examples both labels, of which removing subtracts only one; adapt a run with share_of=examples"
        yield Clash(("prior.share_of", "adapt.kind"), problem)
    quadratic = config.prior.quadratic
    if not isinstance(config.adapt, RemoveData) or config.adapt.retrain or quadratic.weight == 0:
        return
    problem = "what is removed is in it at its theoretical weight, and is taken out at that; adapt a run with 1"
    for name in ("weight", "decay"):
        if getattr(quadratic, name) != 1:
            yield Clash((f"prior.quadratic.{name}", "adapt.kind"), problem)
    if isinstance(config.curvature, (MasCurvature, SiCurvature)):
        problem = "is an importance of weights, from which no example can be taken out; adapt a run of another kind"
        yield Clash(("curvature.kind", "adapt.kind"), problem)


def _adapted(config: RunConfig) -> Iterator[Clash]:
    """Clashes of what `hpccl adapt` writes with RUN's own settings and with those given over them."""
    adapt = config.adapt
    if not isinstance(adapt, AnyAdaptation):
        return
    if config.train.restart or config.train.only_last or config.train.first_task_from is not None:
        yield Clash(
            ("train.restart", "adapt.kind"),
            "an adaptation is one task; leave out restart, only_last and first_task_from",
        )
    if (config.train.data == "seen") != adapt.retrain:
        problem = "the reference trains on all data, an adaptation on new data; leave it as hpccl adapt sets it"
        yield Clash(("train.data", "adapt.retrain"), problem)
    if config.log.reconstruction > 0:
        problem = "compares with the gradient of earlier tasks, but an adaptation has none; set it to 0"
        yield Clash(("log.reconstruction", "adapt.kind"), problem)
    if config.train.loss == "sigmoid":
        problem = "the soft labels of an adaptation are those of a softmax; adapt a run with train.loss=cross_entropy"
        yield Clash(("train.loss", "adapt.kind"), problem)
    if config.train.head_epochs > 0:
        yield Clash(
            ("train.head_epochs", "adapt.kind"),
            "trains rows of new classes, and an adaptation has none; adapt a run with 0",
        )
    if config.evaluate.classifier != "head":
        problem = "uses means that are computed when a task ends, but an adaptation ends none; adapt a run with head"
        yield Clash(("evaluate.classifier", "adapt.kind"), problem)
    if "old_classes" in config.train.frozen:
        problem = "freezes all rows but those of new classes, and an adaptation has none; leave old_classes out"
        yield Clash(("train.frozen", "adapt.kind"), problem)
    scenario = config.stream.scenario
    if isinstance(adapt, AddData) and isinstance(scenario, PermutedScenario | RotatedScenario | BlurryScenario):
        problem = (
            f"{scenario.kind} tasks change or mix images, but added images have no task; adapt a run of another kind"
        )
        yield Clash(("stream.scenario.kind", "adapt.kind"), problem)
    if adapt.retrain:
        return
    usual = PriorConfig()
    for name in ("loss", "label_weight", "scale_to_new", "distill", "correct"):
        if differs(config.prior, usual, name):
            key = f"prior.{name}" + {"distill": ".weight", "correct": ".share"}.get(name, "")
            problem = "is not supported by adaptations; adapt a run that uses only soft labels, replay or a quadratic"
            yield Clash((key, "adapt.kind"), problem)
    if config.memory.labels == "kept":
        problem = (
            "keeps logits of older networks, but adapting needs those of the last one; adapt a run with renewed labels"
        )
        yield Clash(("memory.labels", "adapt.kind"), problem)
    if config.prior.fromp.weight > 0:
        problem = "couples predictions on memory, but an adaptation uses soft labels; adapt a run with soft labels"
        yield Clash(("prior.fromp.weight", "adapt.kind"), problem)
    if config.prior.topology.nodes > 0:
        problem = "keeps features in place for new classes, and an adaptation has none; adapt a run with 0"
        yield Clash(("prior.topology.nodes", "adapt.kind"), problem)
    if not config.prior.some_soft and isinstance(adapt, NewModel):
        problem = (
            "memory with true labels only has nothing of the old network for a new one; adapt a run with soft labels"
        )
        yield Clash(("prior.replay", "adapt.kind"), problem)
    if config.prior.view == "teacher" and isinstance(adapt, NewModel):
        problem = "needs the old network in every step, which is of another kind; set it to stored or recorded"
        yield Clash(("prior.view", "adapt.kind"), problem)
    if config.prior.quadratic.weight > 0 and isinstance(adapt, NewModel):
        problem = "applies to the weights of the old network, not to those of the new one; set it to 0"
        yield Clash(("prior.quadratic.weight", "adapt.kind"), problem)


RULES = (_adapted, _removed)
