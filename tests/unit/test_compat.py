"""timm can be imported and used whatever torchvision's wheel was linked to."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_python(code: str) -> str:
    """What a fresh interpreter prints; its warnings and failures are ours."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_timm_builds_a_model_and_a_transform_and_a_second_call_is_the_same_declaration() -> None:
    code = """
import torch
from hpccl.compat import declare_missing_operators, import_timm
torch.set_num_threads(1)
timm = import_timm()
from timm.data import create_transform
from PIL import Image
transform = create_transform(input_size=32, is_training=True, auto_augment="rand-m9-mstd0.5", re_prob=0.5)
pixels = transform(Image.new("RGB", (40, 40)))
model = timm.create_model("resnet18", num_classes=7).eval()
print(tuple(model(pixels[None]).shape))
print(declare_missing_operators() is declare_missing_operators(), import_timm() is timm)
"""
    assert run_python(code) == "(1, 7)\nTrue True"


def test_importing_compat_does_not_import_torch() -> None:
    assert run_python("import sys, hpccl.compat; print('torch' in sys.modules)") == "False"


def test_operators_that_exist_are_left_alone() -> None:
    code = """
import torch
real = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    real.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
from hpccl.compat import declare_missing_operators, import_timm
print(declare_missing_operators(), import_timm().__name__)
"""
    assert run_python(code) == "None timm"
