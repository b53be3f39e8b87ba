from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from hpccl.config.load import dump, load
from hpccl.config.rules import clashes
from hpccl.config.run import RunConfig
from hpccl.errors import ConfigError

MEMORY = "memory.size=10"
FSDP2, ZERO = "engine.kind=fsdp2", "engine.kind=deepspeed"
KD = "prior.distill.weight=1"
GDUMB = ("train.data=memory", "train.restart=true", "memory.total=20", "prior.replay=1")
ICARL = ("train.loss=sigmoid", "train.head=seen", KD, "prior.distill.images=all", MEMORY, "prior.replay=1")
PICTURES = (
    "stream={kind: shards, parts: [{path: a, tasks: 2}]}",
    "data.image_size=64",
    "data.augment.kind=timm",
    "model={kind: timm, name: resnet18}",
)
BIC = ("train.head=seen", "memory.total=100", "prior.replay=1", "prior.correct.share=0.1")
FROMP = ("prior.fromp.weight=1", MEMORY)
ADAPT = ("adapt={kind: precision, precision: 2.0, source: runs/a, task: 0}", MEMORY)
REMOVE = ("adapt={kind: remove, names: [a], source: runs/a, task: 0}", MEMORY)
RAW = ("curvature.kind=optimizer", "prior.quadratic.weight=1")
ADDED = ("adapt={kind: add, data: [shards/more], source: runs/a, task: 0}", MEMORY)
STUDENT = ("adapt={kind: model, source: runs/a, task: 0}", MEMORY)
MAS = ("curvature.kind=mas", "prior.quadratic.weight=1")
LOCAL = (*MAS, "curvature.variant=local")
SI = ("curvature.kind=si", "prior.quadratic.weight=1")
GROUPED = ("curvature.kind=diagonal", "curvature.fisher=empirical", "curvature.group=8", "prior.quadratic.weight=1")
SHARDS = "stream={kind: shards, parts: [{path: a, tasks: 2}, {path: b}]}"
LARGE = (
    "stream={kind: shards, parts: [{path: a, tasks: 2}]}",
    "model={kind: timm, name: resnet18}",
    "data.image_size=64",
)
PAIR = "stream={kind: shards, parts: [{path: a}, {path: b}]}"
SESSIONS = ("stream.tasks=3", "stream.scenario={kind: few_shot, base: 5, way: 2, shots: 5}")
PERMUTED, BLURRY = "stream.scenario.kind=permuted", "stream.scenario.kind=blurry"
TOPIC = "prior.topology.nodes=5"
DOMAINS = "stream.scenario.kind=domains"


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ([DOMAINS], "stream.scenario.kind"),
        ([SHARDS, DOMAINS], "stream.parts"),
        (["stream={kind: shards, parts: [{path: a, classes: 3}, {path: b}]}", DOMAINS], "stream.parts"),
        ([PAIR, PERMUTED], "stream.parts"),
        ([PAIR, SESSIONS[1]], "stream.parts"),
        ([PAIR, BLURRY], "stream.scenario.kind"),
        (["stream.tasks=1", BLURRY], "stream.scenario.kind"),
        ([BLURRY, "stream.scenario.disjoint=1"], "stream.scenario.disjoint"),
        ([PERMUTED, "data.storage=encoded"], "data.storage"),
        ([PERMUTED, "data.augment.kind=timm", "data.image_size=8"], "data.augment.kind"),
        ([*LARGE, PERMUTED, "data.progressive={first: 32}"], "data.progressive"),
        ([*LARGE, PERMUTED, "data.test_size=72"], "data.test_size"),
        (["stream.scenario={kind: rotated, angles: even, seed: 1}"], "stream.scenario.seed"),
        (["stream.tasks=1", SESSIONS[1]], "stream.tasks"),
        (["stream.tasks=4", SESSIONS[1]], "stream.scenario.base"),
        ([SHARDS.replace("tasks: 2}, {path: b}", "tasks: 3, classes: 9}"), SESSIONS[1]], "stream.parts"),
        ([*SESSIONS, "stream.scenario.seed=1", "stream.scenario.lists=a"], "stream.scenario.seed"),
        ([PERMUTED, "train.head_epochs=1"], "train.head_epochs"),
        (["train.head=seen", "train.competing=task", "prior.quadratic.weight=1"], "train.competing"),
        (["train.head=seen", "train.competing=task", "train.data=seen"], "train.competing"),
        ([*FROMP, "memory.selector={kind: gini, sampled: true}"], "memory.selector.sampled"),
        ([*FROMP, "memory.selector={kind: reconstruction, weights: fitted}"], "memory.selector.weights"),
        (["memory.total=9", "memory.selector={kind: reconstruction, weights: fitted}"], "memory.selector.weights"),
        ([MEMORY, "memory.mix.kind=stratified", "train.batch_size=1"], "memory.mix.kind"),
        (
            ["train.data=memory", "train.restart=true", "memory.total=9", "prior.replay=1", "prior.scale_to_new=true"],
            "prior.scale_to_new",
        ),
        ([MEMORY, "train.loss=sigmoid", "prior.replay=1", "memory.selector.kind=gini"], "memory.selector.kind"),
        ([MEMORY, "prior.loss=squared", "memory.selector.kind=reconstruction"], "memory.selector.kind"),
        (["prior.normal={precision: 1, weight: 0.5}", "train.data=seen"], "prior.normal.weight"),
        ([BLURRY, "train.frozen=[old_classes]"], "train.frozen"),
        ([PERMUTED, TOPIC], "prior.topology.nodes"),
        ([BLURRY, "evaluate.classifier=prototype"], "evaluate.classifier"),
        ([TOPIC, "train.data=seen"], "prior.topology.nodes"),
        ([TOPIC, "prior.topology.anchor=0", "prior.topology.minmax=0"], "prior.topology.nodes"),
        ([TOPIC, "engine.compile=true"], "prior.topology.nodes"),
        ([TOPIC, FSDP2, "engine.compile=true"], "prior.topology.nodes"),
        ([TOPIC, "train.frozen=[features]"], "prior.topology.nodes"),
        ([TOPIC, "train.head_epochs=1"], "prior.topology.nodes"),
        ([TOPIC, "train.restart=true"], "prior.topology.nodes"),
        (["train.norms=running", "train.restart=true"], "train.norms"),
        (["evaluate.classifier=prototype", "train.restart=true"], "evaluate.classifier"),
        ([BLURRY, "train.head=seen", KD, "prior.distill.balance=classes"], "prior.distill.balance"),
        ([PERMUTED, *ICARL], "train.loss"),
        ([BLURRY, *BIC], "prior.correct.share"),
        (["prior.replay=0.5"], "prior.replay"),
        (["prior.normal.weight=2"], "prior.normal.weight"),
        (["prior.normal.precision=1", "optim.weight_decay=0.1"], "optim.weight_decay"),
        (["prior.fromp.weight=1"], "prior.fromp.weight"),
        ([*FROMP, "prior.replay=0.5"], "prior.replay"),
        ([*FROMP, "prior.quadratic.weight=1"], "prior.quadratic.weight"),
        ([*FROMP, "prior.normal.precision=1"], "prior.normal.precision"),
        ([*FROMP, "prior.temperature=2"], "prior.temperature"),
        ([*FROMP, "prior.scale_to_task=true"], "prior.scale_to_task"),
        ([*FROMP, "memory.mix.kind=stratified"], "memory.mix.kind"),
        (["prior.fromp.weight=1", "memory.total=10"], "memory.total"),
        ([*FROMP, "log.reconstruction=0.5"], "log.reconstruction"),
        ([*FROMP, "prior.fromp.kernel=identity", "prior.fromp.jitter=0.1"], "prior.fromp.jitter"),
        ([*FROMP, "memory.labels=kept"], "memory.labels"),
        (["prior.normal.precision=1", "optim.weight_decay=0", MEMORY, "memory.labels=kept"], "memory.labels"),
        (["prior.normal.precision=1", "optim.weight_decay=0", MEMORY, "prior.loss=squared"], "prior.loss"),
        ([*FROMP, "train.head=seen", "train.competing=task"], "train.competing"),
        ([*BIC, "train.loss=sigmoid"], "prior.correct.share"),
        ([*REMOVE, "prior.quadratic.weight=0.5"], "prior.quadratic.weight"),
        ([*REMOVE, "prior.quadratic={weight: 1.0, decay: 0.9}"], "prior.quadratic.decay"),
        ([*REMOVE, *MAS], "curvature.kind"),
        ([*RAW, "train.clip_norm=1"], "train.clip_norm"),
        ([*RAW, "optim.name=adam", "optim.weight_decay=0.1"], "optim.weight_decay"),
        ([MEMORY, "evaluate.classifier=nearest_mean", "memory.balanced=false"], "memory.balanced"),
        (["prior.normal.precision=1", "optim.weight_decay=0", KD], "prior.distill.weight"),
        ([*FROMP, "curvature.kind=mas"], "curvature.kind"),
        ([ADAPT[0], "train.data=seen"], "train.data"),
        ([*ADAPT, "prior.normal={precision: 1.0, weight: 0.5}"], "prior.normal.weight"),
        ([*ADAPT, "optim.weight_decay=0.1"], "optim.weight_decay"),
        ([*ADAPT, "log.reconstruction=0.5"], "log.reconstruction"),
        (
            [
                "adapt={kind: remove, names: [a], source: runs/a, task: 0}",
                MEMORY,
                "prior.replay=0.5",
                "prior.share_of=labels",
            ],
            "prior.share_of",
        ),
        ([*ADAPT, "memory.labels=kept"], "memory.labels"),
        ([*ADAPT, "prior.distill.weight=1"], "prior.distill.weight"),
        ([*ADAPT, "evaluate.classifier=nearest_mean"], "evaluate.classifier"),
        ([*ADAPT, "train.head_epochs=1"], "train.head_epochs"),
        ([*ADAPT, "prior.fromp.weight=1"], "prior.fromp.weight"),
        ([*ADAPT, "train.frozen=[old_classes]"], "train.frozen"),
        ([*ADAPT, "prior.topology.nodes=5"], "prior.topology.nodes"),
        ([*ADDED, "stream.scenario.kind=rotated"], "stream.scenario.kind"),
        ([*ADDED, BLURRY], "stream.scenario.kind"),
        ([*STUDENT, "prior.view=teacher"], "prior.view"),
        ([*STUDENT, "prior.replay=1"], "prior.replay"),
        ([*STUDENT, "prior.quadratic.weight=1"], "prior.quadratic.weight"),
        (["prior.weight=2"], "prior.weight"),
        (["memory.mix.kind=stratified"], "memory.mix.kind"),
        ([MEMORY, "prior.replay=1", "prior.temperature=2"], "prior.temperature"),
        (["prior.temperature=2"], "prior.temperature"),
        ([MEMORY, "prior.replay=1", "prior.view=teacher"], "prior.view"),
        (["prior.view=recorded"], "prior.view"),
        (["prior.classes=known"], "prior.classes"),
        ([MEMORY, "prior.classes=known"], "prior.classes"),
        ([*FROMP, "prior.classes=known"], "prior.classes"),
        ([MEMORY, "prior.classes=known", "train.head=seen", "prior.loss=squared"], "prior.classes"),
        (["train.competing=task"], "train.competing"),
        (["model={kind: timm, name: resnet18.a1_in1k}"], "model.name"),
        (["train.competing=all"], "train.competing"),
        (["train.competing=all", "train.head=seen", MEMORY], "train.competing"),
        (["train.competing=all", "train.head=seen", KD], "train.competing"),
        (["train.competing=all", "train.head=seen", "prior.quadratic.weight=1"], "train.competing"),
        (["train.competing=task", "train.head=seen", "train.data=seen"], "train.competing"),
        ([*ICARL, "train.competing=task"], "train.competing"),
        (["train.only_last=true"], "train.only_last"),
        ([MEMORY, "memory.total=20"], "memory.size"),
        (["memory.total=20", "memory.fraction=0.1"], "memory.total"),
        (["memory.fraction=0.1", "train.data=seen"], "memory.fraction"),
        ([MEMORY, "memory.selector={kind: reconstruction, probes: 0}"], "memory.selector.probes"),
        ([MEMORY, "memory.selector={kind: reconstruction, weights: equal, ridge: 0.1}"], "memory.selector.ridge"),
        ([MEMORY, "memory.selector={kind: reconstruction, ridge: 0.1}"], "memory.selector.ridge"),
        (["train.restart=true", MEMORY], "memory.size"),
        (["train.restart=true", "prior.quadratic.weight=1"], "prior.quadratic.weight"),
        (["train.restart=true", "train.first_task_from=runs/a"], "train.first_task_from"),
        (["train.data=seen", MEMORY], "memory.size"),
        (["train.data=seen", "prior.quadratic.weight=1"], "prior.quadratic.weight"),
        (["train.data=memory", MEMORY, "prior.replay=1"], "train.data"),
        (["train.data=memory", "train.restart=true"], "train.data"),
        ([*GDUMB, "memory.selector.kind=herding"], "memory.selector.kind"),
        ([*GDUMB, "memory.mix.kind=stratified"], "memory.mix.kind"),
        ([*GDUMB[:3], "prior.replay=0.5"], "prior.replay"),
        ([*GDUMB, "prior.weight=2"], "prior.weight"),
        ([*GDUMB, "train.head_epochs=1"], "train.head_epochs"),
        (["train.restart=true", "train.frozen=[features]"], "train.frozen"),
        (["train.restart=true", KD], "prior.distill.weight"),
        (["train.data=seen", KD], "prior.distill.weight"),
        ([KD, "prior.distill.images=all"], "prior.distill.images"),
        ([KD, "prior.distill.images=all", MEMORY, "prior.replay=0.5"], "prior.distill.images"),
        ([KD, "prior.distill.balance=classes"], "prior.distill.balance"),
        ([KD, "prior.distill.scale_t2=true", "prior.distill.temperature=1"], "prior.distill.scale_t2"),
        (["train.loss=sigmoid", "prior.quadratic.weight=1"], "prior.quadratic.weight"),
        (["train.loss=sigmoid", MEMORY], "prior.replay"),
        (["prior.quadratic.decay=0.9"], "prior.quadratic.decay"),
        ([*MAS, MEMORY, "memory.selector.kind=reconstruction", "prior.replay=1"], "memory.selector.kind"),
        ([*GROUPED, "curvature.fisher=ggn"], "curvature.fisher"),
        ([*GROUPED, FSDP2], "curvature.group"),
        ([*GROUPED, ZERO, "engine.stage=3"], "curvature.group"),
        ([*GROUPED, MEMORY, "memory.selector.kind=reconstruction", "prior.replay=1"], "memory.selector.kind"),
        ([*GROUPED[:3], *FROMP], "curvature.group"),
        ([*LOCAL, "curvature.group=8"], "curvature.group"),
        ([*SI, "prior.normal.precision=1"], "prior.normal.precision"),
        ([*SI, MEMORY, "memory.selector.kind=reconstruction", "prior.replay=1"], "memory.selector.kind"),
        ([*SI, "optim.kind=ivon"], "optim.kind"),
        ([*SI, "train.ema=0.9"], "train.ema"),
        (["optim.kind=lie", "optim.group.kind=multiplicative", "train.clip_norm=1"], "train.clip_norm"),
        ([*SI, "train.first_task_from=runs/a"], "train.first_task_from"),
        ([*SI, "train.head_epochs=1"], "train.head_epochs"),
        (["curvature.kind=si", "curvature.fraction=0.5"], "curvature.fraction"),
        (["train.loss=sigmoid", "train.label_smoothing=0.1"], "train.label_smoothing"),
        (["train.loss=sigmoid", KD], "train.head"),
        (["train.loss=sigmoid", "train.head=seen", KD, MEMORY, "prior.replay=1"], "prior.distill.images"),
        ([*ICARL, "memory.dtype=fp16"], "memory.dtype"),
        (["prior.loss=squared"], "prior.loss"),
        (["prior.label_weight=0.5", MEMORY, "prior.replay=1"], "prior.label_weight"),
        (["memory.labels=kept", MEMORY, "prior.replay=1"], "memory.labels"),
        ([MEMORY, "memory.labels=kept", "prior.view=teacher"], "prior.view"),
        ([MEMORY, "prior.label_weight=1", "prior.replay=0.5"], "prior.replay"),
        ([MEMORY, "prior.loss=squared", "prior.temperature=2"], "prior.temperature"),
        ([MEMORY, "prior.loss=squared", "memory.dtype=bf16"], "memory.dtype"),
        ([MEMORY, "prior.scale_to_new=true", "prior.scale_to_task=true"], "prior.scale_to_new"),
        (["prior.scale_to_new=true"], "prior.scale_to_new"),
        ([*BIC, "memory.total=0", MEMORY], "prior.correct.share"),
        ([*BIC, "prior.topology.nodes=5"], "prior.topology.nodes"),
        (["stream.scenario.kind=rotated", "train.flip_test=true"], "train.flip_test"),
        (["stream.scenario.kind=permuted", "train.flip_test=true"], "train.flip_test"),
        (
            [*PICTURES, "data.augment.color_jitter=0.4", "data.augment.auto_augment=rand-m9"],
            "data.augment.color_jitter",
        ),
        ([*BIC, "memory.balanced=false"], "memory.balanced"),
        ([*BIC, "memory.selector.kind=reservoir"], "memory.selector.kind"),
        ([*BIC, "memory.selector.kind=greedy"], "memory.selector.kind"),
        ([*BIC, "train.head=own"], "train.head"),
        ([*BIC, "evaluate.classifier=nearest_mean"], "evaluate.classifier"),
        ([*BIC, "prior.quadratic.weight=1"], "prior.quadratic.weight"),
        (["train.frozen=[features]", "train.head_epochs=2"], "train.head_epochs"),
        (["evaluate.classifier=nearest_mean"], "evaluate.classifier"),
        (["evaluate.means=data"], "evaluate.means"),
        (["data.augment.kind=timm"], "data.augment.kind"),
        (["data.crop_pct=1"], "data.crop_pct"),
        (["data.std=0"], "data.std"),
        (["data.mean=[.1,.2,.3]", "data.std=[1,1]"], "data.mean"),
        (["data.image_size=9", "data.augment={kind: timm, scale: [1.0, 0.5]}"], "data.augment.scale"),
        (["optim.schedule=constant", "optim.final_lr=0.1"], "optim.final_lr"),
        (["train.accumulate=9", "train.batch_size=8"], "train.accumulate"),
        (["curvature.fisher=ggn", "curvature.samples=2"], "curvature.samples"),
        (["train.epochs=[1,2,3,4,5,6]"], "train.epochs"),
        (["optim.lr=[1,2,3]", "stream.tasks=2"], "optim.lr"),
        ([MEMORY, "prior.weight=[1,2,3,4]", SHARDS], "prior.weight"),
        ([FSDP2, "optim.name=lamb"], "optim.name"),
        (["stream.order_seed=5"], "stream.order_seed"),
        (["optim.name=adamw", "optim.momentum=0.5"], "optim.momentum"),
        (["optim.name=kron"], "optim.name"),
        (["optim.name=lookahead_KronW"], "optim.name"),
        (["optim.name=adahessian"], "optim.name"),
        (["prior.quadratic.weight=1", "curvature.fraction=[1.0,0.5,0.5,0.5,0.5,0.5]"], "curvature.fraction"),
        ([ZERO, "engine.stage=1", "optim.name=adafactor"], "optim.name"),
        ([FSDP2, "optim.name=adagrad"], "optim.name"),
        ([ZERO, "optim.name=lion", "optim.options={caution: true}"], "optim.options.caution"),
        ([FSDP2, "engine.compile=true", "engine.recompute=true"], "engine.recompute"),
        ([ZERO, "engine.stage=0", "engine.offload_optimizer=true"], "engine.offload_optimizer"),
        ([ZERO, "engine.stage=2", "engine.offload_weights=true"], "engine.offload_weights"),
    ],
)
def test_a_combination_that_cannot_be_meant(arguments: list[str], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load([], [argument.replace("data.std=0", "data.std=[0.0]") for argument in arguments])
    lines = str(caught.value).splitlines()
    assert [line.split(" = ")[0] for line in lines] == [key]
    assert "(argument '" in lines[0]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        [PAIR, DOMAINS],
        [PERMUTED, KD, "stream.scenario.seed=3"],
        ["stream.scenario={kind: rotated, degrees: 90, angles: even}"],
        [BLURRY, "stream.scenario.blur=0.3", MEMORY],
        [*SI, *ADAPT, "optim.kind=sam"],
        [*SESSIONS, *BIC],
        [*SESSIONS, "stream.scenario.lists=a"],
        [MEMORY, "prior.replay=1"],
        ["memory.total=20", "memory.selector=reconstruction", "memory.selector.probes=0", "prior.replay=0.5"],
        [MEMORY, "memory.selector={kind: reconstruction, weights: fitted, ridge: 0.1}"],
        [
            "memory.fraction=0.5",
            "memory.selector.kind=sensitivity",
            "memory.selector.sampled=true",
            "memory.dtype=bf16",
        ],
        ["memory.selector=herding"],
        [MEMORY, "prior.replay=0.5", "prior.temperature=2", "prior.view=teacher", "memory.mix.kind=stratified"],
        ["train.restart=true", "train.only_last=true", "train.data=seen"],
        [*GDUMB, "train.only_last=true"],
        ["train.data=seen"],
        ["prior.scale_to_task=true", "memory.balanced=false"],
        ["prior.quadratic.weight=1", "prior.quadratic.damping=0"],
        ["data.augment.kind=timm", "data.image_size=224"],
        ["data.augment.kind=crop_flip", "train.batch_size=7", "train.ema=0.9", "engine.precision=bf16"],
        ["train.epochs=[1,2,3]", SHARDS],
        ["curvature.fisher=mc", "curvature.samples=5"],
        ["optim.name=lamb"],
        [ZERO, "engine.stage=0", "optim.name=lamb"],
        [FSDP2, "optim.name=AdamW", "engine.offload=true", "engine.recompute=true"],
        [ZERO, "engine.offload_optimizer=true", "engine.offload_weights=true", "optim.name=lion"],
        [ZERO, "engine.deepspeed={wall_clock_breakdown: true, zero_optimization: {overlap_comm: true}}"],
    ],
)
def test_what_is_fine_stays_fine_when_written_out(arguments: list[str], tmp_path: Path) -> None:
    config = load([], arguments)
    assert clashes(config) == ()
    path = tmp_path / "config.yaml"
    path.write_text(dump(config))
    assert load([path], []) == config


def test_several_clashes_are_told_together_and_name_the_values() -> None:
    with pytest.raises(ConfigError) as caught:
        load([], ["prior.replay=1", "prior.temperature=3", "train.only_last=true"])
    replay, temperature, only_last = str(caught.value).splitlines()
    assert replay == (
        "prior.replay = 1 with memory.size = 0: needs a memory; set memory.size to the examples kept of each task, or "
        "memory.total (argument 'prior.replay=1')"
    )
    assert temperature == (
        "prior.temperature = 3 with memory.size = 0: is about soft labels, but there is no memory; set memory.size, "
        "or leave it 1.0 (argument 'prior.temperature=3')"
    )
    assert only_last.startswith("train.only_last = true with train.restart = false: skips earlier tasks")


def test_a_ridge_alone_names_the_weights_that_it_is_for() -> None:
    with pytest.raises(ConfigError) as caught:
        load([], [MEMORY, "memory.selector.kind=reconstruction", "memory.selector.ridge=0.1"])
    assert str(caught.value) == (
        "memory.selector.ridge = 0.1 with memory.selector.weights = equal: applies to fitted weights only; "
        "set memory.selector.weights=fitted, or leave it 0.01 (argument 'memory.selector.ridge=0.1')"
    )


def test_rules_hold_without_files() -> None:
    with pytest.raises(ValidationError, match=r"prior\.replay: needs a memory"):
        RunConfig.model_validate({"prior": {"replay": 1.0}})


@pytest.mark.parametrize(
    ("key", "value", "ours"),
    [
        ("train_batch_size", "8", "train.batch_size"),
        ("gradient_accumulation_steps", "2", "train.accumulate"),
        ("gradient_clipping", "1.0", "train.clip_norm"),
        ("optimizer", "{type: Adam}", "optim"),
        ("scheduler", "{type: WarmupLR}", "optim.schedule"),
        ("bf16", "{enabled: true}", "engine.precision"),
        ("fp16", "{enabled: true}", "engine.precision"),
        ("activation_checkpointing", "{cpu_checkpointing: true}", "engine.recompute"),
        ("prescale_gradients", "true", "leave it out"),
        ("zero_optimization.stage", "2", "engine.stage"),
        ("zero_optimization.round_robin_gradients", "true", "leave it out"),
        ("zero_optimization.offload_optimizer", "{device: cpu}", "engine.offload_optimizer"),
        ("zero_optimization.offload_param", "{device: cpu}", "engine.offload_weights"),
    ],
)
def test_what_deepspeed_is_told_by_hpccl_names_the_key_that_says_it(key: str, value: str, ours: str) -> None:
    outer, _, inner = key.partition(".")
    told = f"{{{outer}: {{{inner}: {value}}}}}" if inner else f"{{{outer}: {value}}}"
    with pytest.raises(ConfigError) as caught:
        load([], [ZERO, f"engine.deepspeed={told}"])
    assert re.search(
        rf"^engine\.deepspeed\.{re.escape(key)} .*is set by hpccl; (use )?{re.escape(ours)}", str(caught.value)
    )
