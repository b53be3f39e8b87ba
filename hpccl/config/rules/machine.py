"""Of what DeepSpeed and sbatch are told in their own words: nothing that hpccl says, or relies on."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING

from hpccl.config.clash import Clash
from hpccl.config.engine import DeepspeedEngine
from hpccl.config.machine import SlurmCluster

if TYPE_CHECKING:
    from hpccl.config.run import RunConfig

__all__ = ["RULES"]

# DeepSpeed's words for what hpccl's own sections say.
_OURS = {
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.batch_size and train.accumulate",
    "gradient_accumulation_steps": "train.accumulate",
    "managed_gradient_accumulation": "train.accumulate",
    "gradient_clipping": "train.clip_norm",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
    "bf16": "engine.precision",
    "fp16": "engine.precision (weights stay fp32: see docs/engines.md)",
    "torch_autocast": "engine.precision",
    "data_types": "engine.precision",
    "zero_allow_untested_optimizer": "optim",
    "zero_force_ds_cpu_optimizer": "optim",
    "activation_checkpointing": "engine.recompute",
    "prescale_gradients": "nothing: the prior relies on gradients being averaged plainly",
    "gradient_predivide_factor": "nothing: the prior relies on gradients being averaged plainly",
    "gradient_allreduce_op": "nothing: the prior relies on gradients being averaged plainly",
}
_OUR_ZERO = {
    "stage": "engine.stage",
    "offload_optimizer": "engine.offload_optimizer",
    "offload_param": "engine.offload_weights",
    "cpu_offload": "engine.offload_optimizer",
    "round_robin_gradients": "nothing: with it shards are not where DeepSpeed says they are",
    "parameter_alignment": "nothing: hpccl reads shards that lie side by side",
}


# Of sbatch: what hpccl's own keys say, and what it relies on.
_OUR_SBATCH = {
    "nodes": "cluster.nodes",
    "ntasks": "cluster.nodes and cluster.tasks",
    "ntasks-per-node": "cluster.tasks",
    "cpus-per-task": "cluster.cpus",
    "gpus-per-node": "cluster.gpus",
    "mem": "cluster.mem",
    "time": "cluster.time",
    "partition": "cluster.partition",
    "account": "cluster.account",
    "qos": "cluster.qos",
    "constraint": "cluster.constraint",
    "exclude": "cluster.exclude",
    "signal": "cluster.save",
    "dependency": "hpccl submit --dependency",
    "array": "a sweep (key=a,b) and cluster.array",
    "job-name": "name",
    "output": "nothing: logs are in the run folder",
    "error": "nothing: logs are in the run folder",
    "open-mode": "nothing: logs are continued",
    "requeue": "nothing: a run that saved is queued again, cluster.restarts limits how often",
    "no-requeue": "cluster.restarts",
    "wrap": "nothing: hpccl writes the script",
    "chdir": "nothing: a job runs where it is submitted",
    "wait": "hpccl submit --wait",
    "test-only": "hpccl submit --dry-run",
    **dict.fromkeys(("parsable", "quiet", "help", "usage", "version"), "nothing: hpccl reads what sbatch prints"),
}


def _deepspeed(config: RunConfig) -> Iterator[Clash]:
    """Of an engine's stage, and of what is told twice."""
    engine = config.engine
    if not isinstance(engine, DeepspeedEngine):
        return
    if engine.offload_optimizer and engine.stage == 0:
        yield Clash(
            ("engine.offload_optimizer", "engine.stage"), "stage 0 keeps no shards; set engine.stage to 1, 2 or 3"
        )
    if engine.offload_weights and engine.stage < 3:
        yield Clash(
            ("engine.offload_weights", "engine.stage"), "only stage 3 has weights in shards; set engine.stage=3"
        )
    zero = engine.deepspeed.get("zero_optimization", {})
    inner = zero if isinstance(zero, dict) else {}
    taken = {key: _OURS[key] for key in engine.deepspeed if key in _OURS}
    taken |= {f"zero_optimization.{key}": _OUR_ZERO[key] for key in inner if key in _OUR_ZERO}
    for key, ours in taken.items():
        yield Clash((f"engine.deepspeed.{key}",), f"is set by hpccl; say it by {ours}")


def _slurm(config: RunConfig) -> Iterator[Clash]:
    """Of a job's processes, and of what is told twice."""
    cluster = config.cluster
    if not isinstance(cluster, SlurmCluster):
        return
    if config.engine.device == "cuda" and cluster.gpus == 0:
        yield Clash(("engine.device", "cluster.gpus"), "needs GPUs; set cluster.gpus to those of a node")
    if cluster.gpus and cluster.tasks is not None and cluster.tasks != cluster.gpus and config.engine.device != "cpu":
        problem = "a process has one GPU; leave it out, or set engine.device=cpu"
        yield Clash(("cluster.tasks", "cluster.gpus"), problem)
    for module in cluster.modules:
        try:
            shlex.split(module)
        except ValueError:
            yield Clash(("cluster.modules",), f"has a quotation that does not end: {module}")
    for key in cluster.extra:
        if key in _OUR_SBATCH:
            yield Clash((f"cluster.extra.{key}",), f"is set by hpccl; say it by {_OUR_SBATCH[key]}")
        elif re.fullmatch(r"[a-z][a-z0-9-]*", key) is None:
            problem = "is no parameter of sbatch; allowed are its long names without dashes in front, such as nodelist"
            yield Clash((f"cluster.extra.{key}",), problem)


RULES = (_deepspeed, _slurm)
