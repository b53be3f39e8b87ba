"""What is known of a stream before any of its images is decoded."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hpccl.data.layout import ClassTask, Layout
from hpccl.data.protocols import Split
from hpccl.data.views import EvaluationView

__all__ = ["Outline"]


@dataclass(frozen=True, eq=False)
class Outline:
    """A stream without its images: what is known before any of them is decoded.

    image_shape: (channels, height, width) of what the network is trained on
    view: the view of test images
    test_shape: (channels, height, width) of what it is tested on
    as_stored: every image has the view's size already, so that the view changes none
    """

    layout: Layout
    image_shape: tuple[int, int, int]
    view: EvaluationView
    test_shape: tuple[int, int, int]
    as_stored: bool

    @property
    def tasks(self) -> tuple[ClassTask, ...]:
        """In the order of learning."""
        return self.layout.tasks

    @property
    def class_names(self) -> tuple[str, ...]:
        """By class number in the stream."""
        return self.layout.class_names

    def labels(self, split: Split) -> npt.NDArray[np.int64]:
        """[num_samples] class number in the stream, by sample position."""
        return self.layout.index[split].label
