"""The largest scores of every group among the candidates of all ranks: the same ones for any number of ranks.

Candidates are in a total order: the larger score first, of equal scores the smaller hash of (words, sample). `mix` is
injective in its last word, so two samples never tie. Scores are compared bit for bit: the caller sees to it that an
example's score is the same on whichever rank it is computed.

The algorithm is a radix selection on the 128 bits (score, hash), a byte at a time from the top: for each group the
ranks sum how many candidates have each value of the byte, which gives the value at which the quota is reached;
candidates above it are chosen, those below it are out, those at it go on to the next byte. No rank ever sees another's
candidates, only the chosen ones: memory is O(own candidates + groups + chosen), traffic 2 KiB per group and byte.

`Shortlist` takes candidates chunk by chunk and drops those that cannot be chosen: O(kept + chunk) for any stream.

Sampling without replacement with probability proportional to a priority w (Efraimidis and Spirakis 2006, "Weighted
random sampling with a reservoir", Inf. Process. Lett. 97) is the same selection with keys E_i / w_i, smallest first,
where E_i is exponential: a hash of (words, sample). Given the first key t that is not chosen, an example is chosen with
probability 1 - exp(-w_i t), and the chosen values, each divided by its probability, sum to an unbiased estimate of the
sum over the group (Cohen and Kaplan 2007, "Summarizing data using bottom-k sketches", PODC).

Legend: n candidates of this rank, G groups, m chosen of all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np
import numpy.typing as npt
import torch

from hpccl.data.order import mix
from hpccl.dist.comm import Comm
from hpccl.errors import DivergedError

__all__ = ["Chosen", "Shortlist", "exponential", "group_means", "inclusion", "largest"]

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]
Floats = npt.NDArray[np.float64]

_BYTE = np.uint64(0xFF)
_SIGN = np.uint64(1 << 63)
_EXACT = 36  # bits of a score relative to the largest; sums of 2^27 such numbers are exact


@final
@dataclass(frozen=True)
class Chosen:
    """The chosen candidates of all ranks, known to every rank, by group and from best to worst within a group.

    sample: [m] int64; group: [m] int64, ascending; score: [m] float64
    """

    sample: Ints
    group: Ints
    score: Floats

    def __len__(self) -> int:
        return len(self.sample)

    @property
    def place(self) -> Ints:
        """[m] place within its group, from 0."""
        first = np.searchsorted(self.group, self.group, side="left")
        return np.arange(len(self.group)) - first


def largest(
    score: Floats, sample: Ints, group: Ints, quotas: Ints, *, words: tuple[int, ...], comm: Comm, chunk: int = 1 << 20
) -> Chosen:
    """Return the best `quotas` [G] candidates of every group; collective.

    score, sample, group: [n] of this rank's candidates; group < G. The ranks' samples are disjoint.
    words: seed of the order of equal scores.
    chunk: candidates that are processed at a time.

    Raises:
        DivergedError: a score is not a number.
    """
    found = Shortlist(quotas, words=words, slack=chunk)
    for start in range(0, len(score), chunk):
        part = slice(start, start + chunk)
        found.add(score[part], sample[part], group[part])
    return found.finish(comm)


@final
class Shortlist:
    """The best of a stream of candidates so far: at most sum(quotas) + slack of them, and a chunk."""

    def __init__(self, quotas: Ints, *, words: tuple[int, ...], slack: int = 1 << 16) -> None:
        self._quotas, self._words, self._slack = np.asarray(quotas, dtype=np.int64), words, slack
        self._held = _Candidates.of(np.zeros(0), np.zeros(0, np.int64), np.zeros(0, np.int64), words)
        self._pending: list[_Candidates] = []
        self._size = 0
        self._floor = np.zeros(len(self._quotas), dtype=np.uint64)  # smallest key that may still be chosen

    def __len__(self) -> int:
        return self._size

    def add(self, score: Floats, sample: Ints, group: Ints) -> None:
        """Add candidates of this rank; arguments are [n].

        Raises:
            DivergedError: a score is not a number.
        """
        bad = np.isnan(score)
        if bad.any():
            raise DivergedError(
                f"the score of sample {int(sample[bad][0])} is not a number ({int(bad.sum())} of {len(score)} are "
                "not); the model has diverged, or its pixels are not finite"
            )
        more = _Candidates.of(score, sample, group, self._words)
        more = more.only(more.key >= self._floor[more.group])
        self._pending.append(more)
        self._size += len(more)
        if self._size > int(self._quotas.sum()) + self._slack:
            self._prune()

    def finish(self, comm: Comm) -> Chosen:
        """Return the best candidates of all ranks; collective."""
        held = self._joined()
        mine = held.only(_best(held, self._quotas, comm))
        columns = [mine.sample, mine.group, mine.key.view(np.int64), mine.tie.view(np.int64)]
        rows = comm.gather(torch.from_numpy(np.stack(columns, axis=1))).numpy()
        sample, group = rows[:, 0], rows[:, 1]
        key, tie = rows[:, 2].copy().view(np.uint64), rows[:, 3].copy().view(np.uint64)
        order = np.lexsort((tie, ~key, group))
        return Chosen(sample[order], group[order], _scores(key[order]))

    def _joined(self) -> _Candidates:
        self._held, self._pending = _Candidates.joined([self._held, *self._pending]), []
        return self._held

    def _prune(self) -> None:
        held = self._joined()
        self._held = held = held.only(_best(held, self._quotas, Comm.solo()))
        self._size = len(held)
        full = np.bincount(held.group, minlength=len(self._quotas)) == self._quotas
        smallest = np.full(len(self._quotas), np.iinfo(np.uint64).max, dtype=np.uint64)
        np.minimum.at(smallest, held.group, held.key)
        self._floor = np.where(full & (self._quotas > 0), smallest, self._floor)


def exponential(priority: Floats, sample: Ints, *, words: tuple[int, ...]) -> Floats:
    """[n] scores -E / priority, whose largest are a sample without replacement; E is a hash of (words, sample).

    priority: [n] >= 0, finite; examples of priority 0 come last.
    """
    uniform = ((mix(*words, sample) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    with np.errstate(divide="ignore"):
        return np.where(priority > 0, np.log(uniform) / np.where(priority > 0, priority, 1.0), -np.inf)


def inclusion(priority: Floats, threshold: Floats) -> Floats:
    """[n] probability that an example is chosen, given the score of the first example of its group that is not.

    threshold: [n] that score, by `exponential`; -inf where all were chosen.
    """
    return -np.expm1(priority * threshold)


def group_means(score: Floats, group: Ints, counts: Ints, comm: Comm) -> Floats:
    """[G] mean score >= 0 of every group over all ranks' candidates; collective.

    Scores are rounded to 36 bits relative to the group's largest and summed as integers, so that the result is the same
    to the last bit however candidates are distributed over ranks.

    counts: [G] number of candidates on all ranks.
    """
    peak = np.zeros(len(counts))
    np.maximum.at(peak, group, score)
    peak = comm.gather(torch.from_numpy(peak[None])).numpy().max(axis=0)
    unit = np.where(peak > 0, peak, 1.0) * 2.0**-_EXACT
    total = np.zeros(len(counts), dtype=np.int64)
    np.add.at(total, group, np.rint(score / unit[group]).astype(np.int64))
    summed = torch.from_numpy(total)
    comm.sum_([summed])
    means: Floats = summed.numpy() * unit / np.maximum(counts, 1)
    return means


# ---------------------------------------------------------------- selection


@dataclass(frozen=True)
class _Candidates:
    """Candidates of this rank. key: [n] uint64, increasing with the score; tie: [n] uint64 hash, smaller is better."""

    sample: Ints
    group: Ints
    key: Words
    tie: Words

    @classmethod
    def of(cls, score: Floats, sample: Ints, group: Ints, words: tuple[int, ...]) -> _Candidates:
        bits = (np.asarray(score, dtype=np.float64) + 0.0).view(np.uint64)  # + 0 turns -0 into 0
        key = np.where(bits & _SIGN, ~bits, bits | _SIGN)
        return cls(np.asarray(sample, np.int64), np.asarray(group, np.int64), key, mix(*words, np.asarray(sample)))

    @classmethod
    def joined(cls, parts: list[_Candidates]) -> _Candidates:
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in cls.__dataclass_fields__))

    def only(self, which: npt.NDArray[np.bool_]) -> _Candidates:
        return _Candidates(self.sample[which], self.group[which], self.key[which], self.tie[which])

    def __len__(self) -> int:
        return len(self.sample)


def _scores(key: Words) -> Floats:
    return np.where(key & _SIGN, key ^ _SIGN, ~key).view(np.float64)


def _best(held: _Candidates, quotas: Ints, comm: Comm) -> npt.NDArray[np.bool_]:
    """[n] whether a candidate of this rank is among the best `quotas` of its group on all ranks."""
    chosen = np.zeros(len(held), dtype=np.bool_)
    active = np.arange(len(held))
    left = quotas.copy()
    for word in (held.key, ~held.tie):
        for shift in range(56, -8, -8):
            group = held.group[active]
            byte = ((word[active] >> np.uint64(shift)) & _BYTE).astype(np.int64)
            counts = np.bincount(group * 256 + byte, minlength=256 * len(quotas)).reshape(-1, 256)
            summed = torch.from_numpy(counts)
            comm.sum_([summed])
            counts = summed.numpy()
            at_least = counts[:, ::-1].cumsum(axis=1)[:, ::-1]
            # The byte at which the quota is reached: -1 where all candidates are chosen, 256 where none is.
            edge = (at_least >= left[:, None]).sum(axis=1) - 1
            edge[left == 0] = 256
            inside = (edge >= 0) & (edge < 256)
            rows = np.flatnonzero(inside)
            above = np.where(inside, 0, np.where(edge < 0, at_least[:, 0], 0))
            at_edge = np.zeros_like(left)
            above[rows] = at_least[rows, edge[rows]] - counts[rows, edge[rows]]
            at_edge[rows] = counts[rows, edge[rows]]
            left = np.where(edge < 0, 0, left - above)
            whole = inside & (at_edge == left)  # all candidates at the edge are chosen
            left[whole] = 0
            here = edge[group]
            chosen[active[(byte > here) | ((byte == here) & whole[group])]] = True
            active = active[(byte == here) & ~whole[group]]
            if not left.any():
                return chosen
    raise AssertionError("a sample is there twice")
