"""Strategies of avalanche-lib, one step per call; needs `pip install -c constraints.txt avalanche-lib`.

A strategy trains in a thread that stops before each iteration until the next call, so that it can take turns with
others. Only an iteration is measured, from forward pass to update including plugins: not its loader, because our images
are in memory too, and no metrics or loggers, of which it has none.
"""

from __future__ import annotations

import importlib.util
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from hpccl.compat import declare_missing_operators

__all__ = ["PAIRS", "Strategy", "installed", "version"]

# Strategy -> the method of ours that it is compared with.
PAIRS = {
    "avalanche-lib Naive": "finetune",
    "avalanche-lib EWC": "ewc diagonal",
    "avalanche-lib MAS": "mas",
    "avalanche-lib SynapticIntelligence": "si",
    "avalanche-lib LwF": "lwf same",
    "avalanche-lib Replay": "er",
    "avalanche-lib DER": "der",
    "avalanche-lib DER++": "der++",
}
_OWN: dict[str, dict[str, Any]] = {
    "Naive": {},
    "EWC": {"ewc_lambda": 1.0},
    "MAS": {},
    "SynapticIntelligence": {"si_lambda": 1.0},
    "LwF": {"alpha": 1.0, "temperature": 2.0},
    "Replay": {},
    "DER": {"alpha": 0.1, "beta": 0.0},
    "DER++": {"alpha": 0.1, "beta": 0.5},
}
_BUFFERED = ("Replay", "DER", "DER++")  # half of a step is memory


def installed() -> bool:
    """Whether avalanche-lib is installed."""
    return importlib.util.find_spec("avalanche") is not None


def version() -> str:
    """Return the version of avalanche-lib."""
    return str(_module("").__version__)


class Strategy:
    """The second task of a strategy; a call takes a step, and appends its seconds to `cpu` and `clock`.

    name: a key of PAIRS; model: the network; images, labels: [n, ...], [n] of both tasks, the first task first;
    num_steps: the largest number of calls; rows: per step; memory: examples of the first task that are kept
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        images: torch.Tensor,
        labels: torch.Tensor,
        *,
        num_steps: int,
        rows: int,
        memory: int,
    ) -> None:
        """Train the first task and wait before the first step of the second."""
        self.cpu: list[float] = []
        self.clock: list[float] = []
        self._rows, self.go, self.waits = rows, threading.Semaphore(0), threading.Semaphore(0)
        self._failed: Exception | None = None
        kind = name.rsplit(maxsplit=1)[-1]
        new = rows // 2 if kind in _BUFFERED else rows
        half = len(images) // 2
        epochs = -(-num_steps * new // half) + 1
        train = self._prepared(kind, model, images, labels, new=new, epochs=epochs, memory=memory)
        threading.Thread(target=self._run, args=(train,), daemon=True).start()
        self._wait()

    def __call__(self) -> int:
        """Take one step."""
        self.go.release()
        self._wait()
        return self._rows

    def _wait(self) -> None:
        self.waits.acquire()
        if self._failed is not None:
            raise RuntimeError("avalanche-lib failed") from self._failed

    def _run(self, train: Callable[[], None]) -> None:
        try:
            train()
        except Exception as error:  # noqa: BLE001  # whatever it is, the caller's thread raises it
            self._failed = error
        self.waits.release()

    def _prepared(
        self,
        kind: str,
        model: nn.Module,
        images: torch.Tensor,
        labels: torch.Tensor,
        *,
        new: int,
        epochs: int,
        memory: int,
    ) -> Callable[[], None]:
        """Return a function that trains both tasks, the first for one epoch."""
        made: dict[str, Any] = {
            "model": model,
            "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True),
            "criterion": nn.CrossEntropyLoss(),
            "train_mb_size": new,
            "train_epochs": 1,
            "eval_mb_size": new,
            "evaluator": _module(".training.plugins").EvaluationPlugin(),
            **_OWN[kind],
        }
        if kind in _BUFFERED:
            made |= {"mem_size": memory} | ({} if kind == "Replay" else {"batch_size_mem": new})
        strategy = getattr(_module(".training.supervised"), kind.rstrip("+"))(**made)
        first = _First(self)
        strategy.plugins.insert(0, first)
        strategy.plugins.append(_Last(first))
        half = len(images) // 2
        tasks = [(images[:half], labels[:half]), (images[half:], labels[half:])]
        stream = (
            _module(".benchmarks")
            .tensors_benchmark(train_tensors=tasks, test_tensors=tasks, task_labels=[0, 0])
            .train_stream
        )

        def train() -> None:
            torch.set_num_threads(1)
            strategy.train(stream[0], num_workers=0)
            first.counts = True
            strategy.train_epochs = epochs
            strategy.train(stream[1], num_workers=0)

        return train


def _module(name: str) -> Any:
    declare_missing_operators()
    return importlib.import_module(f"avalanche{name}")


class _First:
    """A plugin that runs before all others: it waits for its turn and starts the clock."""

    def __init__(self, owner: Strategy) -> None:
        self.owner, self.counts = owner, False
        self.cpu = self.clock = 0.0

    def before_training_iteration(self, *_: Any, **__: Any) -> None:
        """The event's name."""
        if self.counts:
            self.owner.waits.release()
            self.owner.go.acquire()
        self.cpu, self.clock = time.process_time(), time.perf_counter()


class _Last:
    """A plugin that runs after all others and stops the clock."""

    def __init__(self, first: _First) -> None:
        self.first = first

    def after_training_iteration(self, *_: Any, **__: Any) -> None:
        """The event's name."""
        if self.first.counts:
            self.first.owner.cpu.append(time.process_time() - self.first.cpu)
            self.first.owner.clock.append(time.perf_counter() - self.first.clock)
