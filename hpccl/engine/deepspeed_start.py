"""Start DeepSpeed with checked settings. The only module that imports deepspeed."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from hpccl.config.engine import BUCKET
from hpccl.config.engine import DeepspeedEngine as DeepspeedConfig
from hpccl.config.run import RunConfig
from hpccl.dist.comm import Comm
from hpccl.dist.mesh import meet_alone
from hpccl.errors import ConfigError

__all__ = ["initialize"]


def initialize(model: nn.Module, optimizer: torch.optim.Optimizer, config: RunConfig, comm: Comm) -> Any:
    """Create a DeepSpeed engine.

    Raises:
        ConfigError: DeepSpeed is missing, or refuses a setting.
    """
    os.environ["DS_ACCELERATOR"] = comm.device.type  # else DeepSpeed uses a GPU in spite of engine.device=cpu
    deepspeed = _import()
    meet_alone(comm)
    settings = _settings(config, sum(value.numel() for value in model.parameters()))
    _refuse_unknown(deepspeed, settings, config)
    _name_device(comm.device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # DeepSpeed's own use of deprecated calls
        try:
            engine, *_ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=settings, dist_init_required=False
            )
        except (ValueError, AssertionError) as error:
            raise ConfigError(f"DeepSpeed {deepspeed.__version__} rejects its settings: {error}") from error
    return engine


def _name_device(device: torch.device) -> None:
    """Set LOCAL_RANK for good: DeepSpeed uses the GPU of that number, at its start and later.

    It is another number than the scheduler's where a process sees only its own GPU.
    """
    if device.type == "cpu":
        os.environ.setdefault("LOCAL_RANK", "0")
    else:
        os.environ["LOCAL_RANK"] = str(device.index)


def _import() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import deepspeed
    except ImportError as error:
        raise ConfigError(
            f"engine.kind=deepspeed needs the package deepspeed ({error}); install it: pip install 'hpccl[deepspeed]'"
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*torch.distributed.*is deprecated", category=FutureWarning)
    # On CPUs DeepSpeed would compile an extension at its first start, which only inference uses, and would wait forever
    # for the lock of a process that was killed while compiling.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _settings(config: RunConfig, count: int) -> dict[str, Any]:
    """Merge hpccl's settings and the user's (config.rules refuses conflicts); count: elements of all parameters."""
    engine = config.engine
    assert isinstance(engine, DeepspeedConfig)
    # The reduce bucket holds the whole gradient, up to 200 MB; DeepSpeed's default is 2 GB for networks of any size.
    zero: dict[str, Any] = {"stage": engine.stage, "reduce_bucket_size": min(count, BUCKET)}
    if engine.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if engine.offload_weights:
        zero["offload_param"] = {"device": "cpu"}
    if engine.stage == 3:
        # DeepSpeed's defaults keep up to 1e9 weights gathered between forward and backward pass: all of most networks.
        zero |= {"stage3_max_live_parameters": BUCKET, "stage3_max_reuse_distance": BUCKET}
        zero["stage3_param_persistence_threshold"] = 0
    user = dict(engine.deepspeed)
    zero |= user.pop("zero_optimization", {})
    return {
        "train_micro_batch_size_per_gpu": 1,  # for DeepSpeed's bookkeeping; hpccl makes the batches
        "gradient_accumulation_steps": config.train.accumulate,
        "gradient_clipping": (config.train.clip_norm or 0.0) if engine.stage else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 30,
        "torch_autocast": {
            "enabled": engine.precision == "bf16",
            "dtype": "bfloat16",
            "lower_precision_safe_modules": [],  # all weights are communicated in fp32
        },
        **user,
    }


class _Asked(dict[str, Any]):
    """A dict that records which keys are looked up: DeepSpeed silently ignores those that it does not know."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self.keys_asked: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.keys_asked.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.keys_asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.keys_asked.add(str(key))
        return super().__contains__(key)


def _refuse_unknown(deepspeed: Any, settings: Mapping[str, Any], config: RunConfig) -> None:
    """Check the settings against DeepSpeed's own schema.

    Raises:
        ConfigError: DeepSpeed does not know a setting, or refuses it; names it.
    """
    asked = _Asked(settings)
    try:
        deepspeed.DeepSpeedConfig(asked)
    except (ValueError, AssertionError, TypeError, KeyError) as error:
        lines = " ".join(str(error).split())
        raise ConfigError(f"engine.deepspeed: DeepSpeed {deepspeed.__version__} rejects it: {lines}") from error
    assert isinstance(config.engine, DeepspeedConfig)
    unknown = sorted(set(config.engine.deepspeed) - asked.keys_asked)
    if unknown:
        raise ConfigError(
            f"engine.deepspeed.{unknown[0]} is not a setting of DeepSpeed {deepspeed.__version__}; allowed: "
            f"{', '.join(sorted(asked.keys_asked - settings.keys()))}"
        )
