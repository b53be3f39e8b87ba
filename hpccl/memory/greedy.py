"""Greedy selection within one class, from one vector per example: herding, k-center, matching of a sum.

    herding    argmin_i | mu - (x_i + sum of chosen) / k |          mu the mean of x; x normalised or not
    welling    argmax_i <w, x_i>,  then w += mu - x_i               x normalised; w starts at mu, rows may repeat
    k-center   argmax_i min_{j chosen} | x_i - x_j |
    matching   argmin_i min_t |r - t u_i|,  then weights t >= 0 of the chosen that minimise |r|,  r = b - sum t_j u_j,
               b = sum_i u_i

Each runs in one process: vectors in, the order of choice out, every prefix of which serves as a smaller choice. Ties,
up to rounding, go to the first row. The cost of m choices among n vectors of D numbers is m n D multiplications, and at
worst m^4 / 3 more for the weights of matching.

Sources: Rebuffi et al. 2017, "iCaRL", CVPR, algorithm 4; Welling 2009, "Herding dynamical weights to learn", ICML (the
order in the code that Rebuffi et al. released); Gonzalez 1985, "Clustering to minimize the maximum
intercluster distance" (radius at most twice the optimum); Malkomes et al. 2015, "Fast distributed k-center
clustering" (in blocks: four times); Pati, Rezaiifar and Krishnaprasad 1993, "Orthogonal matching pursuit";
Killamsetty et al. 2021, "GRAD-MATCH", ICML (matching of a sum of gradients); Lawson and Hanson 1974, chapter 23
(weights >= 0).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

__all__ = ["herding", "k_center", "matching", "welling"]

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.floating]

_TIE = 1e-9  # relative difference up to which scores count as equal
_BLOCK = 20_000  # examples among which centers are searched at a time
_TURNS = 1000  # of Welling's herding in the code of iCaRL's authors


def herding(rows: Floats, keep: int, *, normalise: bool = True) -> Ints:
    """[keep] positions of the rows [n, D] whose running mean stays closest to the mean; iCaRL normalises rows first."""
    wide = _unit(rows) if normalise else rows.astype(np.float64)
    mean, half = wide.mean(axis=0), 0.5 * np.square(wide).sum(axis=1)
    free = np.ones(len(wide), dtype=np.bool_)
    order = np.empty(keep, dtype=np.int64)
    total = np.zeros_like(mean)
    for count in range(keep):
        # |k mu - total - x|^2 is a constant minus twice this.
        order[count] = _first_largest(wide @ ((count + 1) * mean - total) - half, free)
        total += wide[order[count]]
        free[order[count]] = False
    return order


def welling(rows: Floats, keep: int, *, turns: int = _TURNS) -> Ints:
    """[keep] positions of the rows [n, D], normalised, in the order in which Welling's herding first picks them.

    A row may be picked again, which takes one of the `turns` and adds nothing. The released code of iCaRL then ends
    with fewer than `keep`; here the rows that were never picked follow, ordered by their products in the last turn.
    """
    wide = _unit(rows)
    mean, every = wide.mean(axis=0), np.ones(len(wide), dtype=np.bool_)
    products, change = wide @ mean, wide @ mean
    met: dict[int, None] = {}
    for _ in range(turns):
        if len(met) >= keep:
            break
        pick = _first_largest(products, every)
        met[pick] = None
        products += change - wide @ wide[pick]
    rest = (int(row) for row in np.argsort(-products, kind="stable") if int(row) not in met)
    return np.fromiter(itertools.islice(itertools.chain(met, rest), keep), dtype=np.int64)


def k_center(rows: Floats, keep: int, *, block: int = _BLOCK) -> Ints:
    """[keep] positions of rows [n, D]: the one nearest to the mean, then always the farthest from those chosen.

    The largest distance of a row to its nearest chosen row is at most twice the optimum. More than `block` rows are cut
    into blocks, each of which proposes `keep` candidates among which the centers are searched: then at most four times.
    """
    if len(rows) <= max(block, keep):
        return _farthest(rows, keep)
    parts = np.array_split(np.arange(len(rows)), -(-len(rows) // block))
    named = np.sort(np.concatenate([part[_farthest(rows[part], min(keep, len(part)))] for part in parts]))
    return np.asarray(named[_farthest(rows[named], keep)])


def matching(
    rows: Floats, keep: int, *, ridge: float = 0.0, given: Floats | None = None
) -> tuple[Ints, npt.NDArray[np.float64]]:
    """[keep] positions of rows u [n, D] and weights t [keep] >= 0 whose weighted sum is close to the sum of all rows.

    With `given` c [n, D], row c_i already stands in for example i as long as i is not chosen: the target is then
    sum_i u_i - sum_{i not chosen} c_i. Each pick is the row that, with its own best weight, leaves the smallest
    residual r: without c, the one with the largest <r, u> / |u|.

    The weights minimise |r|^2 + ridge s^2 |t - t0|^2 over t >= 0; s^2 is the mean of |u|^2, and t0 is n / keep, or 1
    with c. They are exactly 1 where all rows are kept. ridge > 0 keeps a few examples from carrying all the weight.
    """
    wide = rows.astype(np.float64)
    other = np.zeros_like(wide) if given is None else given.astype(np.float64)
    number = len(wide)
    squares, others, both = (np.einsum("nd,nd->n", x, y) for x, y in ((wide, wide), (other, other), (other, wide)))
    pull = max(ridge, 1e-10) * max(float(squares.mean()), 1e-300)  # never 0, so that the solution is unique
    equal = number / max(keep, 1) if given is None else 1.0
    target = (wide - other).sum(axis=0)
    free = np.ones(number, dtype=np.bool_)
    order = np.empty(keep, dtype=np.int64)
    gram = np.zeros((keep, keep))
    weight = np.zeros(0)
    scale = np.where(squares > 0, squares, np.inf)
    for count in range(keep):
        residual = target - weight @ wide[order[:count]]
        along = np.maximum(wide @ residual + both, 0.0)
        order[count] = pick = _first_largest(np.square(along) / scale - 2 * (other @ residual) - others, free)
        free[pick] = False
        target += other[pick]
        gram[count, : count + 1] = wide[order[: count + 1]] @ wide[pick]
        gram[: count + 1, count] = gram[count, : count + 1]
        inside = gram[: count + 1, : count + 1] + pull * np.eye(count + 1)
        right = wide[order[: count + 1]] @ target + pull * equal
        weight = _non_negative(inside, right, np.append(weight, 0.0))
    return order, weight


def _unit(rows: Floats) -> npt.NDArray[np.float64]:
    """Scale rows to norm 1; 0 stays 0."""
    wide = rows.astype(np.float64)
    norms = np.linalg.norm(wide, axis=1)
    wide /= np.where(norms > 0, norms, 1.0)[:, None]
    return wide


def _first_largest(score: npt.NDArray[np.float64], free: npt.NDArray[np.bool_]) -> int:
    """Return the position of the largest score among the free rows; of ties, the first."""
    known = np.where(free, score, -np.inf)
    best = float(known.max())
    return int(np.argmax(known >= best - _TIE * abs(best)))


def _farthest(rows: Floats, keep: int) -> Ints:
    if keep == 0:
        return np.zeros(0, dtype=np.int64)
    wide = rows.astype(np.float64)
    mean = wide.mean(axis=0)
    order = np.empty(keep, dtype=np.int64)
    free = np.ones(len(wide), dtype=np.bool_)
    order[0] = _first_largest(-np.square(wide - mean).sum(axis=1), free)
    squares = np.square(wide).sum(axis=1)
    nearest = np.full(len(wide), np.inf)
    for count in range(1, keep):
        last = order[count - 1]
        free[last] = False
        np.minimum(nearest, squares - 2 * (wide @ wide[last]) + squares[last], out=nearest)
        order[count] = _first_largest(nearest, free)
    return order


def _non_negative(
    gram: npt.NDArray[np.float64], right: npt.NDArray[np.float64], start: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Minimise t'Gt/2 - t'right over t >= 0, G positive definite, starting at some t >= 0 (Lawson and Hanson)."""
    found, passive = start.copy(), start > 0
    tolerance = 1e-12 * float(np.abs(right).max(initial=0.0))
    for entering in _entering(gram, right, found, passive, tolerance):
        passive[entering] = True
        while True:
            trial = np.zeros_like(found)
            trial[passive] = np.linalg.solve(gram[np.ix_(passive, passive)], right[passive])
            bad = passive & (trial <= 0)
            if not bad.any():
                break
            # Move until the first weight would turn negative; it leaves the passive set.
            steps = found[bad] / np.maximum(found[bad] - trial[bad], 1e-300)
            found += float(steps.min()) * (trial - found)
            passive &= found > 1e-15 * max(float(found.max()), 1e-300)
            found[~passive] = 0.0
            if not passive.any():
                break
        found[:] = np.where(passive, trial, 0.0)
    return found


def _entering(
    gram: npt.NDArray[np.float64],
    right: npt.NDArray[np.float64],
    found: npt.NDArray[np.float64],
    passive: npt.NDArray[np.bool_],
    tolerance: float,
) -> Iterator[int]:
    """Yield the zero weight whose growth helps most while there is one; `found` and `passive` change in between."""
    for _ in range(3 * len(right)):
        gain = np.where(passive, -np.inf, right - gram @ found)
        best = int(np.argmax(gain))
        if gain[best] <= tolerance:
            return
        yield best
