"""Learn task by task with a Gaussian process that discards the data and keeps their duals and a small memory.

For the examples D of a task, in this order (Chang et al. 2023, algorithm 1):

    inducing inputs   the pivots among the old ones and D; old duals move to them (`DualPosterior.moved`)
    sites             of D, starting from 0, and of the memory, starting from their last values:
                      alpha, beta <- (1 - r) alpha, beta + r (new at the current marginals), for some steps; the
                      memory's old part of the duals is removed first, since its sites are now known better
    hyperparameters   optionally, by the evidence bound  sum_D E + N/M sum_memory E - KL(q(u) || p(u)),  N examples seen
                      before, M of them in memory; then sites again
    memory            a draw from D in proportion to leverage b_i = sum_c beta_ic v_ic is added to it

For a Gaussian likelihood one step with r = 1 is exact. Every rank has rows of its own and the whole memory; sums over
rows include all ranks, so that results do not depend on the number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import functional

from hpccl.dist.agree import all_or_none
from hpccl.dist.comm import Comm
from hpccl.errors import CheckpointError, ConfigError, DataError
from hpccl.gp.inducing import drawn_by_leverage, pivots
from hpccl.gp.kernel import Kernel
from hpccl.gp.likelihood import Gaussian, Likelihood, Sites, Softmax, likelihood_of
from hpccl.gp.posterior import DualPosterior, Duals, contribution, own_contribution

__all__ = ["Memory", "Settings", "State", "begin", "bound", "learn", "leverage", "typical_distance"]

_LARGEST = 4 << 30  # most bytes of the duals


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


def learn(state: State, x: Tensor, y: Tensor, number: Tensor, *, settings: Settings, comm: Comm) -> State:
    """Return the state after one more task; collective.

    Args:
        state: equal on all ranks.
        x: [n, d] this rank's rows, possibly none (then d and the dtypes are as on other ranks).
        y: [n] labels, or [n, C] targets.
        number: [n] int64 number of each example, unique over ranks and tasks.
        settings: equal on all ranks.
        comm: the ranks.

    Raises:
        ConfigError: there would be too many duals.
        DataError: x or y are not finite or out of range, or there are no examples.
        DivergedError: a matrix has no Cholesky factor.
        WorldError: data were refused on another rank.
    """
    x, y = x.double(), y if y.dim() == 1 else y.double()
    total = _checked(state, x, y, comm, settings)
    posterior, memory = _moved(state, x, number, settings, comm)
    fresh = torch.zeros(len(x), state.likelihood.num_latent, dtype=torch.float64, device=x.device)
    task = _Task(x, y, (fresh, fresh))
    posterior, task, memory = _sites(posterior, state.likelihood, task, memory, settings=settings, comm=comm)
    likelihood = state.likelihood
    if settings.tune and (state.num_seen == 0 or memory is not None):
        past = _Past(_without(posterior, task, memory, comm), memory, state.num_seen)
        kernel, likelihood = _tuned(posterior, likelihood, task, past, settings=settings, comm=comm)
        # Discarded examples keep their duals; those still present get new ones under the new kernel.
        task = replace(task, sites=_at_noise(likelihood, task.y, task.sites))
        posterior = replace(posterior, kernel=kernel, duals=past.duals)
        duals = past.duals.plus(_duals(posterior, task.x, task.sites, comm))
        if memory is not None:
            alpha, beta = _at_noise(likelihood, memory.y, (memory.alpha, memory.beta))
            own = _duals(posterior, memory.x, (alpha, beta), comm, shared=True)
            memory, duals = replace(memory, alpha=alpha, beta=beta, duals=own), duals.plus(own)
        posterior = replace(posterior, duals=duals)
        posterior, task, memory = _sites(posterior, likelihood, task, memory, settings=settings, comm=comm)
    memory = _grown(posterior, task, memory, number, settings=settings, comm=comm)
    return State(posterior.kernel, likelihood, posterior, memory, state.num_seen + total)


def leverage(posterior: DualPosterior, x: Tensor, beta: Tensor) -> Tensor:
    """Return b_i = sum_c beta_ic v_ic [n] at rows x [n, d] with sites beta [n, C]: an example's share of the posterior.

    For a Gaussian likelihood and Z = X the sum over examples is tr K (K + s^2 I)^-1, the effective number of
    parameters.
    """
    _, variance = posterior.predict(x)
    return (beta * variance).sum(1)


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


# ---------------------------------------------------------------- parts of a task


@dataclass(frozen=True)
class _Task:
    """This rank's rows with their sites."""

    x: Tensor
    y: Tensor
    sites: Sites


def _checked(state: State, x: Tensor, y: Tensor, comm: Comm, settings: Settings) -> int:
    """Refuse data that cannot be learned; return the number of examples of all ranks."""

    def check() -> None:
        if len(x) != len(y):
            raise DataError(f"{len(x)} rows and {len(y)} labels for a Gaussian process; give one label per row")
        state.likelihood.check(y)
        bad = ~x.isfinite().all(1)
        if bool(bad.any()):
            raise DataError(
                f"row {int(bad.nonzero()[0])} of {len(x)} for a Gaussian process is not finite; the network that made "
                "its features has diverged, or its input is damaged"
            )

    all_or_none(comm, check, "use its data for the Gaussian process")
    counts = torch.tensor([len(x)], dtype=torch.int64, device=comm.device)
    comm.sum_([counts])
    if not int(counts):
        raise DataError("a task for the Gaussian process has no examples; omit it")
    needed = 8 * state.likelihood.num_latent * settings.inducing**2
    if needed > _LARGEST:
        raise ConfigError(
            f"{state.likelihood.num_latent} latent functions with {settings.inducing} inducing inputs need "
            f"{needed / 2**30:.1f} GiB; allowed: {_LARGEST / 2**30:.0f} GiB; use fewer inducing inputs"
        )
    return int(counts)


def _moved(
    state: State, x: Tensor, number: Tensor, settings: Settings, comm: Comm
) -> tuple[DualPosterior, Memory | None]:
    """Return posterior and memory with new inducing inputs."""
    old = state.posterior
    candidates, names = x, number
    if old is not None:
        size = len(old.inducing)
        part = comm.share(size)
        # Negative numbers are unused, and let old inducing inputs win a tie: inputs that stay are exact.
        own = torch.arange(part.start, part.stop, device=number.device) - size
        candidates = torch.cat([old.inducing[part.start : part.stop], x])
        names = torch.cat([own, number])
    inducing = pivots(state.kernel, candidates, names, settings.inducing, comm)
    if old is None:
        duals = Duals.zeros(state.likelihood.num_latent, len(inducing), x.device)
        return DualPosterior(state.kernel, inducing, duals, settings.jitter), None
    memory = state.memory
    if memory is None:
        posterior, _ = replace(old, jitter=settings.jitter).moved(inducing)
        return posterior, None
    # Moved separately: a difference that is moved is more accurate than a difference of moved duals.
    forgotten = replace(old, jitter=settings.jitter, duals=old.duals.plus(memory.duals, -1.0))
    posterior, projection = forgotten.moved(inducing)
    kept = memory.duals.turned(projection)
    return replace(posterior, duals=posterior.duals.plus(kept)), replace(memory, duals=kept)


def _sites(
    posterior: DualPosterior,
    likelihood: Likelihood,
    task: _Task,
    memory: Memory | None,
    *,
    settings: Settings,
    comm: Comm,
) -> tuple[DualPosterior, _Task, Memory | None]:
    """Iterate the sites of the task and of the memory towards a joint fixed point.

    A step follows the natural gradient of  sum_D E + sum_memory E - KL(q || the process of discarded examples);  one
    that lowers this is undone, and the next is half as long.
    """
    present = _Present.of(posterior, likelihood, task, memory, forgotten=None, comm=comm)
    if isinstance(likelihood, Gaussian):
        present = present.stepped(likelihood, 1.0, comm)
        return present.posterior, present.task, present.memory
    rate = settings.rate
    for _ in range(settings.steps):
        tried = present.stepped(likelihood, rate, comm)
        better = tried.value >= present.value - 1e-9 * abs(present.value)
        present, rate = (tried, min(settings.rate, 1.5 * rate)) if better else (present, rate / 2)
    return present.posterior, present.task, present.memory


@dataclass(frozen=True)
class _Present:
    """The current sites, with marginals and the objective.

    forgotten: duals of discarded examples, neither of the task nor in memory
    new, old: marginals of the task's rows of this rank, and of the memory
    value: the objective, over all ranks
    """

    posterior: DualPosterior
    task: _Task
    memory: Memory | None
    forgotten: Duals
    new: tuple[Tensor, Tensor]
    old: tuple[Tensor, Tensor] | None
    value: float

    @classmethod
    def of(
        cls,
        posterior: DualPosterior,
        likelihood: Likelihood,
        task: _Task,
        memory: Memory | None,
        *,
        forgotten: Duals | None,
        comm: Comm,
    ) -> _Present:
        forgotten = _without(posterior, task, memory, comm) if forgotten is None else forgotten
        new = posterior.predict(task.x)
        total = likelihood.expected_log(task.y, *new).sum().reshape(1)
        old = None
        if memory is not None:
            old = posterior.predict(memory.x)
            part = comm.share(len(memory))
            total = total + likelihood.expected_log(memory.y, *old)[part.start : part.stop].sum()
        comm.sum_([total])
        value = float(total - posterior.divergence(forgotten))
        return cls(posterior, task, memory, forgotten, new, old, value)

    def stepped(self, likelihood: Likelihood, rate: float, comm: Comm) -> _Present:
        """Take one step; collective."""
        task = replace(self.task, sites=_mixed(self.task.sites, likelihood.sites(self.task.y, *self.new), rate))
        duals = self.forgotten.plus(_duals(self.posterior, task.x, task.sites, comm))
        memory = self.memory
        if memory is not None and self.old is not None:
            alpha, beta = _mixed((memory.alpha, memory.beta), likelihood.sites(memory.y, *self.old), rate)
            own = _duals(self.posterior, memory.x, (alpha, beta), comm, shared=True)
            memory, duals = replace(memory, alpha=alpha, beta=beta, duals=own), duals.plus(own)
        posterior = replace(self.posterior, duals=duals)
        return _Present.of(posterior, likelihood, task, memory, forgotten=self.forgotten, comm=comm)


def _mixed(sites: Sites, new: Sites, rate: float) -> Sites:
    return torch.lerp(sites[0], new[0], rate), torch.lerp(sites[1], new[1], rate)


def _duals(posterior: DualPosterior, x: Tensor, sites: Sites, comm: Comm, *, shared: bool = False) -> Duals:
    """Return the duals of all ranks' rows; shared: of rows that all ranks have."""
    if shared:
        part = comm.share(len(x))
        own = slice(part.start, part.stop)
        x, sites = x[own], (sites[0][own], sites[1][own])
    return contribution(posterior.kernel, posterior.inducing, x, sites, comm)


def _without(posterior: DualPosterior, task: _Task, memory: Memory | None, comm: Comm) -> Duals:
    """Return the duals of discarded examples, neither of the task nor in memory."""
    kept = posterior.duals.plus(_duals(posterior, task.x, task.sites, comm), -1.0)
    return kept if memory is None else kept.plus(memory.duals, -1.0)


@dataclass(frozen=True)
class _Past:
    """The duals of discarded examples, the memory, and the number of past examples that it represents."""

    duals: Duals
    memory: Memory | None
    num_seen: int

    @property
    def scale(self) -> float:
        """Factor of the memory in the bound."""
        return self.num_seen / len(self.memory) if self.memory is not None and len(self.memory) else 1.0


def _tuned(
    posterior: DualPosterior, likelihood: Likelihood, task: _Task, past: _Past, *, settings: Settings, comm: Comm
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
    free: list[Tensor], present: DualPosterior, likelihood: Likelihood, task: _Task, past: _Past, *, comm: Comm
) -> list[Tensor]:
    """Return the bound's derivatives by `free`, summed over all ranks.

    The duals are a sum over ranks, through which autograd cannot differentiate: it goes back to the duals, their
    derivatives are summed over ranks, and it continues from this rank's part.
    """
    kernel, inducing, memory = present.kernel, present.inducing, past.memory
    own = own_contribution(kernel, inducing, task.x, _at_noise(likelihood, task.y, task.sites))
    if memory is not None:
        part = comm.share(len(memory))
        mine = slice(part.start, part.stop)
        sites = _at_noise(likelihood, memory.y[mine], (memory.alpha[mine], memory.beta[mine]))
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


def _at_noise(likelihood: Likelihood, y: Tensor, sites: Sites) -> Sites:
    """Return the sites; for a Gaussian likelihood, those at its current noise and y, which alone determine them."""
    return likelihood.sites(y, *sites) if isinstance(likelihood, Gaussian) else sites


def _grown(
    posterior: DualPosterior, task: _Task, memory: Memory | None, number: Tensor, *, settings: Settings, comm: Comm
) -> Memory | None:
    """Return the memory with some of the task's examples added."""
    if not settings.memory:
        return memory
    alpha, beta = task.sites
    size = leverage(posterior, task.x, beta)
    chosen = drawn_by_leverage(size, number, settings.memory, comm, seed=settings.seed)
    mine = torch.isin(number, chosen)
    x, y, sites, names = task.x[mine], task.y[mine], (alpha[mine], beta[mine]), number[mine]
    duals = _duals(posterior, x, sites, comm)
    order = comm.gather(names).argsort()
    x, y, names, alpha, beta = (comm.gather(part)[order] for part in (x, y, names, *sites))
    new = Memory(x, y, names, alpha, beta, duals)
    return new if memory is None else memory.plus(new)


def typical_distance(x: Tensor, comm: Comm) -> float:
    """Return the root mean square distance of two rows of all ranks, as an initial length scale; collective.

    1 if all rows are equal.
    """
    x = x.double()
    sums = torch.cat([x.sum(0), x.square().sum().reshape(1), x.new_tensor([float(len(x))])])
    comm.sum_([sums])
    count = float(sums[-1])
    square = 2 * (float(sums[-2]) / count - float((sums[:-2] / count).square().sum()))
    return math.sqrt(square) if square > 0 else 1.0
