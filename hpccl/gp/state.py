"""A Gaussian process that learns task by task: how it learns a task, what it keeps of one, and its saved state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import functional

from hpccl.errors import CheckpointError, ConfigError
from hpccl.gp.kernel import Kernel
from hpccl.gp.likelihood import Gaussian, Likelihood, Softmax, likelihood_of
from hpccl.gp.posterior import DualPosterior, Duals

__all__ = ["Memory", "Settings", "State", "begin"]


@final
@dataclass(frozen=True)
class Settings:
    """How a task is learned.

    inducing: largest number of inducing inputs
    steps, rate: steps of the sites, and the largest r, in (0, 1]; a Gaussian likelihood always takes one step of rate 1
    memory: number of examples kept from a task
    tune, tune_rate: Adam steps on the logarithms of the hyperparameters (0: leave them), and their learning rate.
        Without a memory only at the first task: later ones lack the likelihood of the past, which the bound needs
    seed: of the memory draws
    jitter: on the diagonal of K, relative to its mean
    """

    inducing: int = 100
    steps: int = 20
    rate: float = 0.5
    memory: int = 0
    tune: int = 0
    tune_rate: float = 0.05
    seed: int = 0
    jitter: float = 1e-9

    def __post_init__(self) -> None:
        """Refuse values out of range, with a ConfigError."""
        for name, low in (("inducing", 1), ("steps", 1), ("memory", 0), ("tune", 0)):
            if getattr(self, name) < low:
                raise ConfigError(f"Gaussian process: {name}={getattr(self, name)}; allowed: at least {low}")
        for name in ("rate", "tune_rate", "jitter"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"Gaussian process: {name}={getattr(self, name)}; allowed: above 0 and at most 1")


@final
@dataclass(frozen=True)
class Memory:
    """Examples that are kept, the same on all ranks.

    x: [k, d]; y: [k] or [k, C]; number: [k] int64, ascending within a task
    alpha, beta: [k, C] their sites
    duals: their part of the posterior's duals
    """

    x: Tensor
    y: Tensor
    number: Tensor
    alpha: Tensor
    beta: Tensor
    duals: Duals

    def __len__(self) -> int:
        return len(self.x)

    def plus(self, other: Memory) -> Memory:
        """Return both memories as one."""
        names = ("x", "y", "number", "alpha", "beta")
        x, y, number, alpha, beta = (torch.cat([getattr(self, name), getattr(other, name)]) for name in names)
        return Memory(x, y, number, alpha, beta, self.duals.plus(other.duals))


@final
@dataclass(frozen=True)
class State:
    """The Gaussian process after some tasks.

    posterior: None before the first
    num_seen: number of examples learned so far, on all ranks
    """

    kernel: Kernel
    likelihood: Likelihood
    posterior: DualPosterior | None = None
    memory: Memory | None = None
    num_seen: int = 0

    def predict(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and variance [n, C] of the latent functions at rows x [n, d].

        Raises:
            DivergedError: a matrix has no Cholesky factor.
        """
        if self.posterior is None:
            zeros = torch.zeros(len(x), self.likelihood.num_latent, dtype=torch.float64, device=x.device)
            return zeros, self.kernel.diagonal(x)[:, None].expand_as(zeros)
        return self.posterior.predict(x.double())

    def widened(self, number: int) -> State:
        """Return a classifier's state for `number` classes; new classes have duals of 0.

        Raises:
            ConfigError: there are fewer classes than before, or the likelihood has no classes.
        """
        if not isinstance(self.likelihood, Softmax) or number < self.likelihood.num_latent:
            raise ConfigError(f"Gaussian process with {number} classes; allowed: at least as many as before")
        more = number - self.likelihood.num_latent
        posterior, memory = self.posterior, self.memory
        if posterior is not None:
            posterior = replace(posterior, duals=posterior.duals.widened(more))
        if memory is not None:
            alpha, beta = (functional.pad(part, (0, more)) for part in (memory.alpha, memory.beta))
            memory = replace(memory, alpha=alpha, beta=beta, duals=memory.duals.widened(more))
        return replace(self, likelihood=Softmax(number), posterior=posterior, memory=memory)

    def state_dict(self) -> dict[str, Any]:
        """The state as tensors and JSON values; `from_state_dict` is the inverse."""
        posterior, memory, by = self.posterior, self.memory, self.likelihood
        parts = None if memory is None else {**vars(memory), "duals": dict(vars(memory.duals))}
        own = None
        if posterior is not None:
            own = {"inducing": posterior.inducing, "duals": dict(vars(posterior.duals)), "jitter": posterior.jitter}
        noise = {"noise": by.noise} if isinstance(by, Gaussian) else {}
        return {
            "kernel": dict(vars(self.kernel)),
            "likelihood": {"kind": type(by).__name__.lower(), "num_latent": by.num_latent, **noise},
            "posterior": own,
            "memory": parts,
            "num_seen": self.num_seen,
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> State:
        """The inverse of `state_dict`.

        Raises:
            CheckpointError: the state is damaged.
        """
        try:
            kernel, own, kept = Kernel(**state["kernel"]), state["posterior"], state["memory"]
            posterior = None
            if own is not None:
                posterior = DualPosterior(kernel, own["inducing"], Duals(**own["duals"]), own["jitter"])
            memory = None if kept is None else Memory(**{**kept, "duals": Duals(**kept["duals"])})
            likelihood = likelihood_of(**state["likelihood"])
            return cls(kernel, likelihood, posterior, memory, int(state["num_seen"]))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"the state of a Gaussian process is damaged ({error!r}); fit it again") from error


def begin(kernel: Kernel, likelihood: Likelihood) -> State:
    """Return the state before the first task."""
    return State(kernel, likelihood)
