"""The memory's tensors: admission, soft labels of heads of different widths, saving."""

from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor

from hpccl.memory.store import Memory, head_columns, stored


def filled() -> Memory:
    memory = Memory.empty().admit(
        task=0, sample=torch.tensor([3, 5]), label=torch.tensor([0, 1]), replay=torch.tensor([False, True])
    )
    return memory.admit(
        task=1, sample=torch.tensor([11, 12, 13]), label=torch.tensor([2, 4, 3]), replay=torch.tensor([False] * 3)
    )


def labelled(logits: Tensor, dtype: Literal["fp32", "fp16", "bf16"] = "fp32") -> Memory:
    """`filled` with soft labels of its two tasks' heads."""
    memory, heads = filled(), head_columns([(0, 1), (2, 3, 4)])
    columns = heads[memory.task]
    return replace(memory, soft=stored(logits.gather(1, columns.clamp(min=0)), columns, dtype), heads=heads)


def test_soft_targets_are_the_own_heads_softmax() -> None:
    logits = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    memory = labelled(logits)
    target, head = memory.soft_targets(torch.tensor([0, 2]), temperature=2.0, num_classes=6)
    assert head.tolist() == [[True, True, False, False, False, False], [False, False, True, True, True, False]]
    torch.testing.assert_close(target[0, :2], (logits[0, :2] / 2).softmax(0))
    torch.testing.assert_close(target[1, 2:5], (logits[2, 2:5] / 2).softmax(0))
    assert float(target[0, 2:].sum()) == 0
    assert float(target[1, :2].sum() + target[1, 5]) == 0


def test_agreement_counts_right_soft_labels_by_task() -> None:
    logits = torch.full((5, 6), -1.0)
    logits[torch.arange(5), torch.tensor([0, 0, 2, 4, 2])] = 3.0
    logits[:, 5] = 9.0  # another task's class never competes
    memory = labelled(logits)
    assert memory.agreement(2) == [0.5, float(torch.tensor(2 / 3))]


def test_state_round_trip_and_sizes() -> None:
    memory = filled()
    again = Memory.from_state_dict(memory.state_dict())
    assert all(torch.equal(value, getattr(again, name)) for name, value in memory.tensors().items())
    assert memory.per_task(3) == [2, 3, 0]
    assert len(memory) == 5
    assert memory.num_bytes > 0
    assert len(Memory.empty()) == 0


def test_shrinking_drops_the_last_of_the_order_and_keeps_mean_weights() -> None:
    memory = Memory.empty().admit(
        task=0,
        sample=torch.tensor([3, 5, 8, 9]),
        label=torch.tensor([0, 1, 0, 1]),
        replay=torch.tensor([False, True, True, True]),
        weight=torch.tensor([1.0, 3.0, 2.0, 0.5]),
        order=torch.tensor([2, 0, 1, 3]),
    )
    memory = memory.admit(task=1, sample=torch.tensor([11]), label=torch.tensor([2]), replay=torch.tensor([False]))
    few = memory.shrunk([3, 1])
    assert few.sample.tolist() == [3, 5, 8, 11]
    assert few.order.tolist() == [2, 0, 1, 0]
    torch.testing.assert_close(few.weight, torch.tensor([1.0, 1.75, 2.0, 1.0]))
    assert few.shrunk([1, 0]).sample.tolist() == [5]
    assert memory.shrunk([4, 1]) is memory
    assert len(memory.shrunk([0, 0])) == 0


def test_checkpoints_without_weights_have_ones_and_a_balanced_order() -> None:
    state = filled().state_dict()
    del state["weight"], state["rank"], state["heads"]
    state["columns"] = torch.tensor([[0, 1, -1], [0, 1, -1], [2, 3, 4], [2, 3, 4], [2, 3, 4]])
    state["label"] = torch.tensor([0, 0, 2, 2, 3])
    again = Memory.from_state_dict(state)
    assert again.weight.tolist() == [1.0] * 5
    assert again.heads.tolist() == [[0, 1, -1], [2, 3, 4]]
    assert again.order.tolist() == [0, 1, 0, 2, 1]  # one of each class before the second of one


@pytest.mark.parametrize(("dtype", "bound", "share"), [("fp32", 1e-7, 1.0), ("fp16", 4e-4, 0.5), ("bf16", 1.5e-3, 0.5)])
def test_soft_labels_of_less_precision(dtype: Literal["fp32", "fp16", "bf16"], bound: float, share: float) -> None:
    random = torch.Generator().manual_seed(3)
    logits = torch.randn(5, 6, generator=random) * torch.tensor([0.1, 1.0, 10.0, 100.0, 3e4])[:, None] + 1e3
    exact = labelled(logits)
    memory = labelled(logits, dtype)
    slots = torch.arange(5)
    expected, _ = exact.soft_targets(slots, temperature=1.0, num_classes=6)
    found, _ = memory.soft_targets(slots, temperature=1.0, num_classes=6)
    assert found.dtype == torch.float32
    assert float((found - expected).abs().max()) < bound
    assert memory.soft_bytes == share * exact.soft_bytes
    assert memory.agreement(2) == exact.agreement(2)
    again = memory.admit(task=1, sample=torch.tensor([1]), label=torch.tensor([2]), replay=torch.tensor([False]))
    assert again.soft.dtype == memory.soft.dtype


def test_probabilities_stay_within_the_stated_bound() -> None:
    """Two classes, logits 0 and -z over the whole range: nothing is further off than `stored` says."""
    z = torch.linspace(0, 30, 20_001)
    logits = torch.stack([torch.zeros_like(z), -z], dim=1)
    columns = torch.tensor([[0, 1]]).expand(len(z), 2)
    expected = logits.softmax(dim=1)
    for dtype, bound in (("fp16", 4e-4), ("bf16", 1.5e-3)):
        kept = stored(logits, columns, dtype)  # type: ignore[arg-type]  # the names of the dtypes
        assert float((kept.float().softmax(dim=1) - expected).abs().max()) < bound
