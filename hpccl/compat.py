"""Import timm where torchvision's compiled operators cannot be loaded.

timm needs torchvision. The torchvision wheel on the package index is linked to CUDA; with a CPU build of torch its
operator library does not load, and `import torchvision` ends in `RuntimeError: operator torchvision::nms does not
exist`, because it registers shape functions for two operators that nobody declared. hpccl calls neither of them, so it
is enough to declare their schemas before the first import of timm. Where the real operators load, nothing is done:
declaring them a second time would make torchvision's own library fail.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.library import Library

__all__ = ["declare_missing_operators", "import_timm"]

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_OPERATORS = ("nms", "qnms")


def import_timm() -> ModuleType:
    """Return timm, after declaring torchvision's missing operators; later `from timm... import` statements work too."""
    declare_missing_operators()
    return importlib.import_module("timm")


@functools.cache  # keeps the Library alive: its declarations disappear with it
def declare_missing_operators() -> Library | None:
    """Declare torchvision's `nms` and `qnms` if torch is a CPU build and they cannot be loaded; None otherwise."""
    import torch

    if torch.version.cuda is not None or _operators_load():
        return None
    library = torch.library.Library("torchvision", "DEF")
    for name in _OPERATORS:
        library.define(name + _SCHEMA)
    return library


def _operators_load() -> bool:
    import torch

    if hasattr(torch.ops.torchvision, "nms"):
        return True
    spec = importlib.util.find_spec("torchvision")
    folders = (spec.submodule_search_locations if spec else None) or []
    return any(_loads(file) for folder in folders for file in Path(folder).glob("_C*.so"))


def _loads(file: Path) -> bool:
    import torch

    try:
        torch.ops.load_library(file)
    except OSError:
        return False
    return True
