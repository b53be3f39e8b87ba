"""scikit-learn's 1,797 handwritten digits (8 x 8, one channel): real images without a download."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from hpccl.data.decoded import Kept
from hpccl.data.layout import Collection
from hpccl.data.order import permutation
from hpccl.data.protocols import Split
from hpccl.data.views import EvaluationView

__all__ = ["SIZE", "TITLE", "digits", "digits_split"]

TITLE = "digits"
SIZE = 8  # pixels a side, as stored
_TEST_SHARE = 0.2
_SEED = 0  # of the split; fixed, because scikit-learn defines no test set


def digits(
    *, tasks: int, views: Mapping[Split, EvaluationView], test_split: Split = "test"
) -> tuple[Collection, dict[Split, Kept], dict[Split, npt.NDArray[np.int64]]]:
    """Return the data set and, by split, its pixels uint8 [num, h, w, 1] and their numbers in scikit-learn's data.

    test_split: which of the two splits to test on; `train` for a caller that holds some of it out.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    # Values in the data are 0 to 16.
    images = np.round(data.images * (255 / 16)).astype(np.uint8)[:, :, :, None]
    labels = data.target.astype(np.int64)
    cut = digits_split(labels)
    numbers: dict[Split, npt.NDArray[np.int64]] = {"train": cut["train"], "test": cut[test_split]}
    kept: dict[Split, Kept] = {
        split: Kept(np.stack([views[split](images[number]) for number in mine])) for split, mine in numbers.items()
    }
    collection = Collection(
        title=TITLE,
        class_names=[str(name) for name in data.target_names],
        labels={split: labels[mine] for split, mine in numbers.items()},
        groups={split: np.zeros(len(mine), dtype=np.int64) for split, mine in numbers.items()},
        tasks=tasks,
    )
    return collection, kept, numbers


def digits_split(labels: npt.NDArray[np.int64]) -> dict[Split, npt.NDArray[np.int64]]:
    """Return the numbers of the training and test images, ascending: a fixed fifth of each class is for testing."""
    test = np.zeros(len(labels), dtype=bool)
    for name in np.unique(labels):
        mine = np.flatnonzero(labels == name)
        chosen = permutation(len(mine), _SEED, int(name))[: round(_TEST_SHARE * len(mine))]
        test[mine[chosen]] = True
    return {"train": np.flatnonzero(~test), "test": np.flatnonzero(test)}
