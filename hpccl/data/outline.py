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

    image_shape: (channels, height, width) of training images
    view: the view of test images
    test_shape: (channels, height, width) of test images
    as_stored: whether every image already has the view's size, so that the view changes none
    """

    layout: Layout
    image_shape: tuple[int, int, int]
    view: EvaluationView
    test_shape: tuple[int, int, int]
    as_stored: bool

    @property
    def tasks(self) -> tuple[ClassTask, ...]:
        """The tasks in learning order."""
        return self.layout.tasks

    @property
    def class_names(self) -> tuple[str, ...]:
        """The class names, by class number in the stream."""
        return self.layout.class_names

    def labels(self, split: Split) -> npt.NDArray[np.int64]:
        """[num_samples] class number in the stream, by sample position."""
        return self.layout.index[split].label
