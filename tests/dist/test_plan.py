"""A plan is what a run holds and sends: predicted bytes against those of live tensors and collectives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hpccl.config.optim import VognOptim
from hpccl.curvature.online import watch_squares
from hpccl.curvature.protocols import Precision
from hpccl.dist.comm import Comm
from hpccl.engine.moments import local
from hpccl.tools.plan.build import make_plan
from tests.dist.world import Result, run_in_world
from tests.run.method import learn, make_world, merged

TASKS = 2
NETWORK: dict[str, Any] = {
    "stream": {"kind": "digits", "tasks": TASKS},
    "model": {"kind": "mlp", "hidden": [96, 48]},
    "train": {"epochs": 1, "batch_size": 128, "accumulate": 2},
    "memory": {"size": 30},
    "prior": {"replay": 0.5, "quadratic": {"weight": 1.0}},
    # The first layer has the diagonal, which is spread as weights are.
    "curvature": {"kind": "kronecker", "fisher": "empirical", "diagonal": ["1"]},
}
ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {"kind": "ddp"},
    "fsdp2": {"kind": "fsdp2"},
    **{f"zero-{stage}": {"kind": "deepspeed", "stage": stage} for stage in (1, 2, 3)},
    "zero-3, weights go": {
        "kind": "deepspeed",
        "deepspeed": {"zero_optimization": {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}},
    },
}
# How often a ring passes the whole message on, but for one rank's share of it.
ROUNDS = {"allreduce_": 2, "_allgather_base_": 1, "_reduce_scatter_base_": 1}


class Sending(TorchDispatchMode):
    """Adds up what a rank sends if every collective is a ring."""

    def __init__(self, comm: Comm) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.share, self.num_bytes = (comm.size - 1) / comm.size, 0.0
        self.rounds = {**ROUNDS, "allgather_": comm.size}  # of parts in a list

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            whole = max(leaf.nbytes for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
            self.num_bytes += self.rounds[func._schema.name.removeprefix("c10d::")] * self.share * whole
        return func(*args, **(kwargs or {}))


def num_bytes(tree: Any) -> int:
    """Of all tensors in a nest; of those that are spread, of this rank's part."""
    if isinstance(tree, dict):
        return sum(map(num_bytes, tree.values()))
    if isinstance(tree, (list, tuple)):
        return sum(map(num_bytes, tree))
    own = getattr(tree, "local", tree)
    return own.nbytes if isinstance(own, Tensor) else 0


def held_bytes(precision: Precision) -> int:
    return num_bytes(precision.state_dict()) + num_bytes(precision.shard_dict())


def gradients(engine: Any) -> list[Tensor]:
    """Between two micro-batches; DeepSpeed has its own places for them."""
    zero = getattr(engine, "_zero", None)
    if zero is not None and engine._stage == 3:
        return [zero.grad_partitions_flat_buffer]
    named = [local(value.grad) for value in engine._model.parameters() if value.grad is not None]
    if zero is not None:
        named += [value.grad_accum for value in engine._model.parameters() if value.grad_accum is not None]
        named += [value for values in zero.all_grad_tensors.values() for value in values or ()]
    return list({value.untyped_storage().data_ptr(): value for value in named}.values())


def copies(engine: Any) -> list[Tensor]:
    """Of weights, that DeepSpeed's optimiser works on."""
    zero = getattr(engine, "_zero", None)
    if zero is None:
        return []
    return list(zero.fp32_partitioned_groups_flat if engine._stage == 3 else zero.single_partition_of_fp32_groups)


def two_tasks(comm: Comm, folder: str, changes: dict[str, Any]) -> Result:
    """What a rank holds after both tasks, and what it sends in one more step."""
    state, world = make_world(merged(NETWORK, changes), Path(folder) / f"size-{comm.size}", comm)
    learn(state, world, TASKS)
    engine, quadratic = state.engine, state.prior.quadratic
    assert quadratic is not None
    saved = engine.state_dict()
    found: Result = {
        "weights": num_bytes(saved["weights"]),
        "optimizer": num_bytes(saved["optimizer"]["moments"]) + num_bytes(copies(engine)),
        "old weights": num_bytes(state.prior.anchor),
        "curvature": held_bytes(quadratic.precision),
        "memory": state.prior.memory.num_bytes - state.prior.memory.soft_bytes,
    }
    if saved["credit"]:
        found["path"] = num_bytes(saved["credit"]) + num_bytes(saved["begun"])
    if changes["engine"]["kind"] == "deepspeed" and changes["engine"].get("stage", 3) == 3:
        second = engine.module.parameters()
        found["network for passes outside training"] = num_bytes([local(value.detach()) for value in second])
    engine.start(num_steps=1, task=1)
    if isinstance(world.config.optim, VognOptim):
        watch_squares(engine.training_module, engine.add_squares)
    with Sending(comm) as sending:
        for number in range(engine.passes):
            with engine.perturbed(number, num_rows=16):
                for last in (False, True):
                    logits = engine.forward(torch.zeros(4, 1, 8, 8), torch.arange(4), last=last)
                    engine.backward(logits.logsumexp(1).sum())
                    if not last:
                        found["gradients"] = sum(value.untyped_storage().nbytes() for value in gradients(engine))
        engine.step()
    return {**found, "sent": sending.num_bytes}


@pytest.mark.parametrize(("engine", "size"), [(name, 2) for name in ENGINES] + [("ddp", 4), ("fsdp2", 4)], ids=str)
def test_what_is_held_and_sent_is_what_was_planned(engine: str, size: int, tmp_path: Path) -> None:
    compare({"engine": ENGINES[engine]}, size, tmp_path)


def test_a_path_is_planned(tmp_path: Path) -> None:
    assert "path" in compare({"engine": ENGINES["fsdp2"], "curvature": {"kind": "si"}}, 2, tmp_path)


MORE = [("vogn", "zero-2"), ("vogn", "ddp"), ("bsam", "zero-1"), ("sam", "zero-3")]


@pytest.mark.parametrize(
    ("optimiser", "engine"),
    [("vogn", "fsdp2"), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in MORE)],
)
def test_what_optimisers_with_trial_weights_send_is_planned(optimiser: str, engine: str, tmp_path: Path) -> None:
    compare({"engine": ENGINES[engine], "optim": {"kind": optimiser}}, 2, tmp_path)


def compare(changes: dict[str, Any], size: int, tmp_path: Path) -> dict[str, float]:
    """What was found on the ranks, by name."""
    results = run_in_world(two_tasks, size, tmp_path, str(tmp_path), changes)
    plan = make_plan(merged(NETWORK, changes), nodes=1, nproc=size, measured=False)
    planned = {each.name: each.num_bytes for each in plan.held if each.when == "always"}
    most = {name: max(result[name] for result in results) for name in results[0]}
    assert plan.wire("step") == pytest.approx(most.pop("sent"), rel=0.05)
    for name, found in most.items():
        assert planned[name] == pytest.approx(found, rel=0.15), name
    assert sum(planned[name] for name in most) == pytest.approx(sum(most.values()), rel=0.15)
    return most
