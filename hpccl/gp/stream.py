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
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hpccl.dist.agree import all_or_none
from hpccl.dist.comm import Comm
from hpccl.errors import ConfigError, DataError
from hpccl.gp.evidence import Past, Task, at_noise, tuned
from hpccl.gp.inducing import drawn_by_leverage, pivots
from hpccl.gp.likelihood import Gaussian, Likelihood, Sites
from hpccl.gp.posterior import DualPosterior, Duals, contribution
from hpccl.gp.state import Memory, Settings, State

__all__ = ["learn", "leverage", "typical_distance"]

_LARGEST = 4 << 30  # most bytes of the duals


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
    task = Task(x, y, (fresh, fresh))
    posterior, task, memory = _sites(posterior, state.likelihood, task, memory, settings=settings, comm=comm)
    likelihood = state.likelihood
    if settings.tune and (state.num_seen == 0 or memory is not None):
        past = Past(_without(posterior, task, memory, comm), memory, state.num_seen)
        kernel, likelihood = tuned(posterior, likelihood, task, past, settings=settings, comm=comm)
        # Discarded examples keep their duals; those still present get new ones under the new kernel.
        task = replace(task, sites=at_noise(likelihood, task.y, task.sites))
        posterior = replace(posterior, kernel=kernel, duals=past.duals)
        duals = past.duals.plus(_duals(posterior, task.x, task.sites, comm))
        if memory is not None:
            alpha, beta = at_noise(likelihood, memory.y, (memory.alpha, memory.beta))
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


# ---------------------------------------------------------------- parts of a task


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
    task: Task,
    memory: Memory | None,
    *,
    settings: Settings,
    comm: Comm,
) -> tuple[DualPosterior, Task, Memory | None]:
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
    task: Task
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
        task: Task,
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


def _without(posterior: DualPosterior, task: Task, memory: Memory | None, comm: Comm) -> Duals:
    """Return the duals of discarded examples, neither of the task nor in memory."""
    kept = posterior.duals.plus(_duals(posterior, task.x, task.sites, comm), -1.0)
    return kept if memory is None else kept.plus(memory.duals, -1.0)


def _grown(
    posterior: DualPosterior, task: Task, memory: Memory | None, number: Tensor, *, settings: Settings, comm: Comm
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
