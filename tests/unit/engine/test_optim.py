"""Learning rates are functions of the step; the optimiser comes from timm's factory."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from hpccl.compat import import_timm
from hpccl.config.optim import TimmOptim
from hpccl.config.run import RunConfig
from hpccl.engine.moments import load_state, state_of
from hpccl.engine.optim import _FUSED, build_optimizer, learning_rate
from hpccl.errors import ConfigError


def names() -> Iterator[str]:
    """All optimisers of timm that a run may have and that need neither CUDA nor another package."""
    import_timm()
    from timm.optim import list_optimizers

    for name in list_optimizers(exclude_filters=["bnb*", "fused*"]):
        try:
            RunConfig.model_validate({"optim": {"name": name}})
        except ValidationError:
            continue
        yield str(name)


def trained(name: str, seed: int) -> Tensor:
    """Weights after some steps whose random numbers, but not gradients, depend on the seed."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(32, 20))
    optimizer = build_optimizer(TimmOptim(name=name, lr=(1e-2,)), model)
    gradients = torch.Generator().manual_seed(0)
    for step in range(4):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=gradients)
        torch.manual_seed(1000 * seed + step)
        optimizer.step()
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def rates(config: TimmOptim, task: int = 0, num_steps: int = 100) -> list[float]:
    return [learning_rate(config, task=task, step=step, num_steps=num_steps) for step in range(num_steps)]


def test_onecycle_rises_from_a_25th_and_falls_to_nothing() -> None:
    found = rates(TimmOptim(lr=(0.1,), schedule="onecycle", warmup=0.3))
    assert found[0] == pytest.approx(0.1 * (1 / 25 + 24 / 25 / 31))
    assert max(found) == pytest.approx(0.1, rel=0.01)
    assert 28 <= found.index(max(found)) <= 31
    assert found[-1] < 1e-3 * 0.1


def test_cosine_ends_at_the_final_share() -> None:
    found = rates(TimmOptim(lr=(1.0,), schedule="cosine", final_lr=0.1))
    assert found[0] == 1.0
    assert found[50] == pytest.approx(0.55)
    assert found[-1] == pytest.approx(0.1, abs=1e-3)


def test_lr_is_constant_and_may_change_with_the_task() -> None:
    config = TimmOptim(lr=(1.0, 0.5), schedule="constant")
    assert set(rates(config)) == {1.0}
    assert set(rates(config, task=1)) == set(rates(config, task=7)) == {0.5}


def test_weight_decay_spares_biases() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
    optimizer = build_optimizer(TimmOptim(name="adamw", weight_decay=0.1), model)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays[id(model[0].weight)] == 0.1
    assert {decays[id(p)] for p in (model[0].bias, model[1].weight, model[1].bias)} == {0.0}


@pytest.mark.parametrize("changes", [{"name": "adamwv"}, {"name": "sgd", "options": {"colour": 1}}])
def test_wrong_optimiser_is_a_clear_error(changes: dict[str, object]) -> None:
    with pytest.raises(
        ConfigError, match=r"optim.name '(adamwv' was refused: .*similar: adamw,|sgd' with options .* was refused)"
    ):
        build_optimizer(TimmOptim(**changes), torch.nn.Linear(2, 2))  # type: ignore[arg-type]


def test_no_optimiser_draws_random_numbers() -> None:
    """Every process has a seed of its own, but all have to take the same step. Of new ones, `_UNFIT` has to know."""
    found = list(names())
    assert {"adamw", "lamb", "muon", "novograd"} <= set(found)
    assert not {"kron", "adahessian"} & set(found)
    for name in found:
        assert torch.equal(trained(name, 0), trained(name, 1)), name


def on_meta(name: str) -> tuple[torch.optim.Optimizer, dict[Tensor, str]]:
    """An optimiser of parameters that are not in host memory, and their names."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(32, 20)).to("meta")
    options: dict[str, Any] = {"fused": False} if name in _FUSED else {}
    optimizer = build_optimizer(TimmOptim(name=name, options=options), model)
    return optimizer, {parameter: key for key, parameter in model.named_parameters()}


def from_file(node: Any) -> Any:
    """The same as read from a checkpoint, with all tensors in host memory."""
    if isinstance(node, dict):
        return {key: from_file(value) for key, value in node.items()}
    if isinstance(node, list):
        return [from_file(value) for value in node]
    assert isinstance(node, Tensor | bool | int | float | None), "is written and restored"
    return torch.zeros(node.shape, dtype=node.dtype) if isinstance(node, Tensor) else node


def test_restored_state_is_on_the_devices_where_each_optimiser_made_it() -> None:
    for name in names():
        one, its_names = on_meta(name)
        for parameter in its_names:
            parameter.grad = torch.ones_like(parameter)
        with contextlib.suppress(RuntimeError):  # some read a number, which a tensor without data does not have
            one.step()
        two, other_names = on_meta(name)
        load_state(two, other_names, {}, from_file(state_of(one, its_names, {})))
        assert len(two.state) == len(one.state) > 0, name
        made, restored = (
            {
                (number, key): value.device
                for number, entries in enumerate((*optimizer.state.values(), *optimizer.param_groups))
                for key, value in entries.items()
                if isinstance(value, Tensor)
            }
            for optimizer in (one, two)
        )
        assert restored == made, name
