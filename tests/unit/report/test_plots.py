"""Figures of runs that went wrong are drawn all the same."""

import numpy as np

from hpccl.report.metrics import calibration_bins
from hpccl.report.plots import calibration


def test_what_is_no_number_is_left_out_of_a_reliability_diagram() -> None:
    """An event has it as a word."""
    words = {"task_incremental": [["NaN"] * 15] * 3, "class_incremental": [[1.0] * 15, [0.5] * 15, ["NaN"] * 15]}
    assert "<svg" in str(calibration(words, "bins"))  # type: ignore[arg-type]  # as JSON has them
    assert calibration({}, "bins") is None
    bins = calibration_bins([np.nan, 0.5, 0.9], [False, True, True])
    assert bins[0].sum() == 2
    assert np.isfinite(bins).all()
