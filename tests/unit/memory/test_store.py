"""The memory's tensors: admission, soft labels of heads of different widths, saving."""

import torch

from hpccl.memory.store import Memory


def filled() -> Memory:
    memory = Memory.empty().admit(
        task=0, sample=torch.tensor([3, 5]), label=torch.tensor([0, 1]), replay=torch.tensor([False, True])
    )
    return memory.admit(
        task=1, sample=torch.tensor([11, 12, 13]), label=torch.tensor([2, 4, 3]), replay=torch.tensor([False] * 3)
    )


def test_soft_targets_are_the_own_heads_softmax() -> None:
    logits = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    memory = filled().relabelled(logits, [(0, 1), (2, 3, 4)])
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
    memory = filled().relabelled(logits, [(0, 1), (2, 3, 4)])
    assert memory.agreement(2) == [0.5, float(torch.tensor(2 / 3))]


def test_state_round_trip_and_sizes() -> None:
    memory = filled()
    again = Memory.from_state_dict(memory.state_dict())
    assert all(torch.equal(value, getattr(again, name)) for name, value in vars(memory).items())
    assert memory.per_task(3) == [2, 3, 0]
    assert len(memory) == 5
    assert memory.num_bytes > 0
    assert len(Memory.empty()) == 0
