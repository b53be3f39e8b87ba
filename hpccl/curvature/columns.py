"""Vectors over the logits whose pull-back to the weights, squared and summed, is the diagonal of a Fisher matrix.

For example i with own-head logits z, p = softmax(z) and weight w, columns v_1..v_c obey

    ggn:        sum_j v_j v_j' = w (diag(p) - p p')        exactly, with c = K - 1 columns for K classes
    mc:         v_j = sqrt(w / c) (p - e_y), y ~ p         so that the expectation is the same
    empirical:  v_1 = sqrt(w) (p - e_label)
    weighted:   v_1 = sqrt(w p_label) (p - e_label), as in Mammoth's EWC: only the true label's term of the exact Fisher
                matrix, which is a sum over labels
    predicted:  v_1 = sqrt(w) (p - e_argmax), smallest where the network is confident
    outputs:    v_1 = 2 w z, the gradient of w |z|^2, as in Memory Aware Synapses (Aljundi et al. 2018, eq. 2)

and sum_j (J' v_j)^2, J = dz/dweights, is what example i adds to the diagonal. Logits of other heads get exactly 0.
K - 1 columns suffice because diag(p) - p p' has the null vector 1; they are its Cholesky factor, known in closed form
(Tanabe and Sagae 1992, JRSS B 54, eq. 4): with tails q_j = p_j + ... + p_K,

    L_jj = sqrt(p_j q_{j+1} / q_j),   L_ij = -(p_i / q_{j+1}) L_jj   for i > j.

Legend: n examples, C logits, K own-head classes, c columns. Probabilities are float64, to avoid cancellation in tails.
"""

from __future__ import annotations

from typing import Literal, assert_never

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from hpccl.curvature.protocols import Examples
from hpccl.data.order import splitmix
from hpccl.errors import DataError

__all__ = ["Fisher", "Wanted", "check_labels", "hessian_root", "num_columns", "output_columns", "uniform_draws"]

Fisher = Literal["ggn", "mc", "empirical", "weighted", "predicted"]
Wanted = Literal["ggn", "mc", "empirical", "weighted", "predicted", "outputs"]


def num_columns(fisher: Wanted, num_classes: int, samples: int) -> int:
    """Return the number of columns, c, for `num_classes` own-head classes."""
    match fisher:
        case "ggn":
            return num_classes - 1
        case "mc":
            return samples
        case "empirical" | "weighted" | "predicted" | "outputs":
            return 1
        case _:
            assert_never(fisher)


def output_columns(logits: Tensor, examples: Examples, fisher: Wanted, *, samples: int, seed: int) -> Tensor:
    """Return columns [c, n, C] in the dtype of `logits` [n, C]; see the module."""
    classes = examples.head.nonzero().flatten()
    if fisher == "outputs":
        whole = torch.zeros_like(logits)[None]
        whole[0][:, classes] = 2 * examples.weight.to(logits.dtype)[:, None] * logits.detach()[:, classes]
        return whole
    own = logits.detach().double()[:, classes].softmax(dim=1)
    match fisher:
        case "ggn":
            columns = hessian_root(own).permute(2, 0, 1)
        case "mc":
            draws = uniform_draws(examples.sample.cpu().numpy(), samples, seed)
            columns = _residuals(own, _inverse_cdf(own, torch.from_numpy(draws).to(own.device))) / samples**0.5
        case "empirical" | "weighted":
            label = torch.searchsorted(classes, examples.labels)[:, None]
            columns = _residuals(own, label)
            if fisher == "weighted":
                columns = columns * own.gather(1, label).sqrt()
        case "predicted":
            columns = _residuals(own, own.argmax(dim=1, keepdim=True))
        case _:
            assert_never(fisher)
    columns = columns * examples.weight.double().sqrt()[None, :, None]
    whole = logits.new_zeros(len(columns), *logits.shape)
    whole[:, :, classes] = columns.to(logits.dtype)
    return whole


def hessian_root(probabilities: Tensor) -> Tensor:
    """Return L [n, K, K-1] with L L' = diag(p) - p p', for `probabilities` [n, K]."""
    tails = probabilities.flip(1).cumsum(1).flip(1)
    tail, rest = tails[:, :-1], tails[:, 1:]
    # Where a tail underflows to 0, columns are 0 instead of 0 / 0.
    diagonal = (probabilities[:, :-1] * rest / tail.where(tail > 0, 1)).sqrt()
    shares = probabilities[:, :, None] / rest.where(rest > 0, 1)[:, None, :]
    unit = torch.eye(*shares.shape[1:], dtype=shares.dtype, device=shares.device)
    return (unit - shares.tril(-1)) * diagonal[:, None, :]


def uniform_draws(sample: npt.NDArray[np.int64], count: int, seed: int) -> npt.NDArray[np.float64]:
    """Draw [n, count] numbers in [0, 1), each a pure function of (seed, sample, position in its row)."""
    with np.errstate(over="ignore"):
        start = splitmix(np.full(1, seed, dtype=np.uint64))
        rows = splitmix(np.add(start, sample, dtype=np.uint64, casting="unsafe"))
        draws = splitmix(np.add(rows[:, None], np.arange(count), dtype=np.uint64, casting="unsafe"))
    return np.asarray((draws >> np.uint64(11)) * 2.0**-53, dtype=np.float64)


def check_labels(examples: Examples) -> None:
    """Refuse a label outside the head, which would be measured as a wrong class.

    Raises:
        DataError: an example's label is not in its head.
    """
    outside = ~examples.head[examples.labels]
    if bool(outside.any()):
        row = int(outside.nonzero()[0])
        raise DataError(
            f"sample {int(examples.sample[row])} has class {int(examples.labels[row])}, which is not in its task's "
            f"head {examples.head.nonzero().flatten().tolist()}; labels must be the stream's class numbers"
        )


def _residuals(own: Tensor, classes: Tensor) -> Tensor:
    """Residuals p - e_y as [c, n, K], for y = `classes` [n, c] among the own head."""
    return own[None] - functional.one_hot(classes.T, own.shape[1]).to(own.dtype)


def _inverse_cdf(own: Tensor, draws: Tensor) -> Tensor:
    """Return [n, c] class positions, for `draws` [n, c] in [0, 1)."""
    steps = own.cumsum(1)
    # Scaled by the last step, which may differ from 1 by rounding, so that no draw lies beyond it.
    return torch.searchsorted(steps, draws * steps[:, -1:], right=True).clamp(max=own.shape[1] - 1)
