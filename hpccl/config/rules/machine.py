"""Settings of DeepSpeed and sbatch that are refused, because hpccl sets them or relies on them."""

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

# DeepSpeed's keys that hpccl sets, and what to do instead.
_OURS = {
    "train_batch_size": "use train.batch_size",
    "train_micro_batch_size_per_gpu": "use train.batch_size and train.accumulate",
    "gradient_accumulation_steps": "use train.accumulate",
    "managed_gradient_accumulation": "use train.accumulate",
    "gradient_clipping": "use train.clip_norm",
    "optimizer": "use optim",
    "scheduler": "use optim.schedule",
    "bf16": "use engine.precision",
    "fp16": "use engine.precision (weights stay fp32: see docs/engines.md)",
    "torch_autocast": "use engine.precision",
    "data_types": "use engine.precision",
    "zero_allow_untested_optimizer": "use optim",
    "zero_force_ds_cpu_optimizer": "use optim",
    "activation_checkpointing": "use engine.recompute",
    "prescale_gradients": "leave it out: the prior relies on a plain average of gradients",
    "gradient_predivide_factor": "leave it out: the prior relies on a plain average of gradients",
    "gradient_allreduce_op": "leave it out: the prior relies on a plain average of gradients",
}
_OUR_ZERO = {
    "stage": "use engine.stage",
    "offload_optimizer": "use engine.offload_optimizer",
    "offload_param": "use engine.offload_weights",
    "cpu_offload": "use engine.offload_optimizer",
    "round_robin_gradients": "leave it out: with it shards are not where DeepSpeed reports them",
    "parameter_alignment": "leave it out: hpccl reads contiguous shards",
}


# The same for parameters of sbatch.
_OUR_SBATCH = {
    "nodes": "use cluster.nodes",
    "ntasks": "use cluster.nodes and cluster.tasks",
    "ntasks-per-node": "use cluster.tasks",
    "cpus-per-task": "use cluster.cpus",
    "gpus-per-node": "use cluster.gpus",
    "mem": "use cluster.mem",
    "time": "use cluster.time",
    "partition": "use cluster.partition",
    "account": "use cluster.account",
    "qos": "use cluster.qos",
    "constraint": "use cluster.constraint",
    "exclude": "use cluster.exclude",
    "signal": "use cluster.save",
    "dependency": "use hpccl submit --dependency",
    "array": "use a sweep (key=a,b) and cluster.array",
    "job-name": "use name",
    "output": "leave it out: logs are in the run folder",
    "error": "leave it out: logs are in the run folder",
    "open-mode": "leave it out: logs are appended to",
    "requeue": "leave it out: a run that saved is requeued, and cluster.restarts limits how often",
    "no-requeue": "use cluster.restarts",
    "wrap": "leave it out: hpccl writes the script",
    "chdir": "leave it out: a job runs in the folder that it is submitted from",
    "wait": "use hpccl submit --wait",
    "test-only": "use hpccl submit --dry-run",
    **dict.fromkeys(("parsable", "quiet", "help", "usage", "version"), "leave it out: hpccl reads what sbatch prints"),
}


def _deepspeed(config: RunConfig) -> Iterator[Clash]:
    """Clashes with the stage, and keys that hpccl sets itself."""
    engine = config.engine
    if not isinstance(engine, DeepspeedEngine):
        return
    if engine.offload_optimizer and engine.stage == 0:
        yield Clash(
            ("engine.offload_optimizer", "engine.stage"), "stage 0 keeps no shards; set engine.stage to 1, 2 or 3"
        )
    if engine.offload_weights and engine.stage < 3:
        yield Clash(("engine.offload_weights", "engine.stage"), "only stage 3 shards weights; set engine.stage=3")
    zero = engine.deepspeed.get("zero_optimization", {})
    inner = zero if isinstance(zero, dict) else {}
    taken = {key: _OURS[key] for key in engine.deepspeed if key in _OURS}
    taken |= {f"zero_optimization.{key}": _OUR_ZERO[key] for key in inner if key in _OUR_ZERO}
    for key, ours in taken.items():
        yield Clash((f"engine.deepspeed.{key}",), f"is set by hpccl; {ours}")


def _slurm(config: RunConfig) -> Iterator[Clash]:
    """Clashes of a job's processes, and parameters that hpccl sets itself."""
    cluster = config.cluster
    if not isinstance(cluster, SlurmCluster):
        return
    if config.engine.device == "cuda" and cluster.gpus == 0:
        yield Clash(("engine.device", "cluster.gpus"), "needs GPUs; set cluster.gpus to their number per node")
    if cluster.gpus and cluster.tasks is not None and cluster.tasks != cluster.gpus and config.engine.device != "cpu":
        problem = "every process has one GPU; leave it out, or set engine.device=cpu"
        yield Clash(("cluster.tasks", "cluster.gpus"), problem)
    for module in cluster.modules:
        try:
            shlex.split(module)
        except ValueError:
            yield Clash(("cluster.modules",), f"has an unclosed quotation mark: {module}")
    for name, value in cluster.environment.items():
        if re.search(rf"\$({name}\b|{{{name}\b)", value):
            problem = f"would not be expanded, but be '{value}' literally; write `export {name}=...` into cluster.setup"
            yield Clash((f"cluster.environment.{name}",), problem)
    for key in cluster.extra:
        if key in _OUR_SBATCH:
            yield Clash((f"cluster.extra.{key}",), f"is set by hpccl; {_OUR_SBATCH[key]}")
        elif re.fullmatch(r"[a-z][a-z0-9-]*", key) is None:
            problem = "is not a parameter of sbatch; allowed: long names without leading dashes, such as nodelist"
            yield Clash((f"cluster.extra.{key}",), problem)


RULES = (_deepspeed, _slurm)
