"""What the DeepSpeed engine does without DeepSpeed."""

import torch

from hpccl.dist.spread import Span
from hpccl.engine.deepspeed import _filled
from hpccl.engine.moments import device_of


def test_a_fused_optimiser_counts_steps_beside_its_weights() -> None:
    flat = torch.empty(4, device="meta")
    places = {"weight": (Span((4,), 0, 4), 0)}
    moments = {"weight": {"step": torch.tensor(3.0)}}
    found = {
        fused: _filled(flat, places, moments, "step", device_of("step", {"fused": fused}, flat)).device.type
        for fused in (False, True)
    }
    assert found == {False: "cpu", True: "meta"}
