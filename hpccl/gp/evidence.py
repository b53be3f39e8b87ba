"""The evidence bound of a Gaussian process that has discarded data, and hyperparameters that raise it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hpccl.dist.comm import Comm
from hpccl.gp.kernel import Kernel
from hpccl.gp.likelihood import Gaussian, Likelihood, Sites
from hpccl.gp.posterior import DualPosterior, Duals, own_contribution
from hpccl.gp.state import Memory, Settings

__all__ = ["Past", "Task", "at_noise", "bound", "tuned"]


@dataclass(frozen=True)
class Task:
    """This rank's rows with their sites."""

    x: Tensor
    y: Tensor
    sites: Sites


def bound(
    posterior: DualPosterior,
    likelihood: Likelihood,
    x: Tensor,
    y: Tensor,
    comm: Comm,
    *,
    memory: Memory | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Return this rank's share of the evidence bound in nats; the sum over ranks is the bound. Not collective.

    Args:
        posterior: q.
        likelihood: of the examples.
        x: [n, d] this rank's rows.
        y: their labels or targets.
        comm: determines this rank's share of the memory.
        memory: examples of the past.
        scale: factor of their expected log likelihoods.
    """
    total = likelihood.expected_log(y, *posterior.predict(x)).sum() - posterior.divergence() / comm.size
    if memory is not None and len(memory):
        part = comm.share(len(memory))
        own = slice(part.start, part.stop)
        total = total + scale * likelihood.expected_log(memory.y[own], *posterior.predict(memory.x[own])).sum()
    return total


@dataclass(frozen=True)
class Past:
    """The duals of discarded examples, the memory, and the number of past examples that it represents."""

    duals: Duals
    memory: Memory | None
    num_seen: int

    @property
    def scale(self) -> float:
        """Factor of the memory in the bound."""
        return self.num_seen / len(self.memory) if self.memory is not None and len(self.memory) else 1.0


def tuned(
    posterior: DualPosterior, likelihood: Likelihood, task: Task, past: Past, *, settings: Settings, comm: Comm
) -> tuple[Kernel, Likelihood]:
    """Return hyperparameters with a larger evidence bound; collective.

    Sites alpha, beta are fixed (those of a Gaussian likelihood follow its noise), and duals follow the kernel: at the
    optimum of the sites this bound is tighter than the one with fixed duals (Adam et al. 2021, sec. 3.2).
    """
    kernel = posterior.kernel
    values = [kernel.lengthscale, kernel.variance, *([likelihood.noise] if isinstance(likelihood, Gaussian) else [])]
    logs = [value.detach().log().clone().requires_grad_() for value in values]
    if kernel.kind == "linear":
        logs[0].requires_grad_(False)  # redundant with the variance
    free = [log for log in logs if log.requires_grad]
    optimiser = torch.optim.Adam(free, lr=settings.tune_rate, maximize=True)
    for _ in range(settings.tune):
        present, by = _at(logs, posterior, likelihood)
        gradients = _slope(free, present, by, task, past, comm=comm)
        for log, gradient in zip(free, gradients, strict=True):
            log.grad = gradient
        optimiser.step()
    present, by = _at([log.detach() for log in logs], posterior, likelihood)
    return present.kernel, by


def _at(logs: list[Tensor], posterior: DualPosterior, likelihood: Likelihood) -> tuple[DualPosterior, Likelihood]:
    kernel = Kernel(posterior.kernel.kind, logs[0].exp(), logs[1].exp())
    by = replace(likelihood, noise=logs[2].exp()) if isinstance(likelihood, Gaussian) else likelihood
    return replace(posterior, kernel=kernel), by


def _slope(
    free: list[Tensor], present: DualPosterior, likelihood: Likelihood, task: Task, past: Past, *, comm: Comm
) -> list[Tensor]:
    """Return the bound's derivatives by `free`, summed over all ranks.

    The duals are a sum over ranks, through which autograd cannot differentiate: it goes back to the duals, their
    derivatives are summed over ranks, and it continues from this rank's part.
    """
    kernel, inducing, memory = present.kernel, present.inducing, past.memory
    own = own_contribution(kernel, inducing, task.x, at_noise(likelihood, task.y, task.sites))
    if memory is not None:
        part = comm.share(len(memory))
        mine = slice(part.start, part.stop)
        sites = at_noise(likelihood, memory.y[mine], (memory.alpha[mine], memory.beta[mine]))
        own = own.plus(own_contribution(kernel, inducing, memory.x[mine], sites))
    total = Duals(own.first.detach().clone(), own.second.detach().clone())
    comm.sum_([total.first, total.second])
    leaves = [each.requires_grad_() for each in vars(past.duals.plus(total)).values()]
    bounded = bound(
        replace(present, duals=Duals(*leaves)), likelihood, task.x, task.y, comm, memory=memory, scale=past.scale
    )
    direct: Sequence[Tensor | None] = torch.autograd.grad(
        bounded, [*free, *leaves], retain_graph=True, allow_unused=True
    )
    found = [torch.zeros_like(log) if each is None else each for log, each in zip(free, direct, strict=False)]
    outer = [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, direct[len(free) :], strict=True)]
    comm.sum_(outer)
    if own.first.requires_grad:
        more: Sequence[Tensor | None] = torch.autograd.grad([own.first, own.second], free, outer, allow_unused=True)
        found = [each if g is None else each + g for each, g in zip(found, more, strict=True)]
    comm.sum_(found)
    return found


def at_noise(likelihood: Likelihood, y: Tensor, sites: Sites) -> Sites:
    """Return the sites; for a Gaussian likelihood, those at its current noise and y, which alone determine them."""
    return likelihood.sites(y, *sites) if isinstance(likelihood, Gaussian) else sites
