"""Build an optimiser with trial weights from a configuration."""

from __future__ import annotations

from typing import TypeAlias, assert_never

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from hpccl.config.optim import BsamOptim, IvonOptim, LieOptim, SamOptim, SobaOptim, VognOptim
from hpccl.optim.ivon import Ivon
from hpccl.optim.lie import Lie
from hpccl.optim.perturbing import Perturbing
from hpccl.optim.sam import Bsam, Sam
from hpccl.optim.soba import Soba
from hpccl.optim.vogn import Vogn

__all__ = ["PerturbingConfig", "build_perturbing"]

PerturbingConfig: TypeAlias = IvonOptim | SamOptim | BsamOptim | VognOptim | SobaOptim | LieOptim


def build_perturbing(config: PerturbingConfig, model: nn.Module) -> Perturbing:
    """Build the optimiser for the trainable parameters of `model`."""
    parameters = [value for value in model.parameters() if value.requires_grad]
    match config:
        case IvonOptim():
            return Ivon(parameters, config)
        case SamOptim():
            return Sam(parameters, config)
        case BsamOptim():
            return Bsam(parameters, config)
        case VognOptim():
            return Vogn(_by_prior(model), config)
        case SobaOptim():
            return Soba(parameters, config)
        case LieOptim():
            return Lie(parameters, config)
        case _ as never:
            assert_never(never)


def _by_prior(model: nn.Module) -> list[dict[str, object]]:
    """Return groups with and without a prior: BatchNorm's parameters have none, since they only scale other weights."""
    norms = {id(value) for module in model.modules() if isinstance(module, _BatchNorm) for value in module.parameters()}
    held = [value for value in model.parameters() if value.requires_grad]
    groups: list[dict[str, object]] = [
        {"params": [value for value in held if (id(value) in norms) != prior], "prior": prior}
        for prior in (True, False)
    ]
    return [group for group in groups if group["params"]]
