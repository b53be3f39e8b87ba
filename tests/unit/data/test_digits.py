from __future__ import annotations

import numpy as np
import pytest
import torch

from hpccl.config.data import CropFlip, DataConfig, TimmAugment
from hpccl.config.stream import DigitsStream
from hpccl.data.build import open_stream
from hpccl.data.digits import digits_split
from hpccl.data.protocols import Stream
from hpccl.data.rows import Request
from hpccl.errors import ConfigError


def evaluation(samples: range) -> Request:
    return Request(np.array(samples), np.zeros(len(samples), dtype=np.uint64))


def test_five_tasks_of_two_digits() -> None:
    stream = open_stream(DigitsStream(), DataConfig())
    assert [task.name for task in stream.tasks] == [f"digits[{k}/5]" for k in range(1, 6)]
    assert [task.classes for task in stream.tasks] == [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
    assert stream.class_names == tuple("0123456789")
    assert stream.image_shape == (1, 8, 8)
    assert len(stream.labels("train")) + len(stream.labels("test")) == 1797
    assert not stream.skipped()
    for task in stream.tasks:
        assert set(stream.labels("train")[task.samples("train")]) == set(task.classes)
        assert set(stream.labels("test")[task.samples("test")]) == set(task.classes)


def test_pixels_are_scikit_learns() -> None:
    from sklearn.datasets import load_digits

    data = load_digits()
    stream = open_stream(DigitsStream(order="random", order_seed=3), DataConfig(mean=(0.0,), std=(1.0,)))
    samples = range(100, 140)
    names = stream.sample_names("train", np.array(samples))
    numbers = [int(name.removeprefix("digits/")) for name in names]
    [images] = stream.load([evaluation(samples)])
    expected = torch.from_numpy(data.images[numbers] / 16).unsqueeze(1).float()
    torch.testing.assert_close(images.pixels, expected, atol=0.5 / 255 + 1e-6, rtol=0)
    labels = [stream.class_names[label] for label in stream.labels("train")[100:140]]
    assert labels == [str(data.target[number]) for number in numbers]
    assert images.valid.all()
    np.testing.assert_array_equal(stream.raw(100)[:, :, 0], np.round(data.images[numbers[0]] * 255 / 16))


def test_the_split_is_fixed_stratified_and_a_partition() -> None:
    from sklearn.datasets import load_digits

    labels = load_digits().target
    split = digits_split(labels)
    together = np.concatenate([split["train"], split["test"]])
    np.testing.assert_array_equal(np.sort(together), np.arange(1797))
    share = np.bincount(labels[split["test"]]) / np.bincount(labels)
    np.testing.assert_allclose(share, 0.2, atol=0.003)
    # Chosen once; another choice would make published numbers incomparable.
    np.testing.assert_array_equal(split["test"][:8], [0, 2, 5, 26, 32, 33, 36, 40])


def test_settings_that_digits_cannot_have() -> None:
    with pytest.raises(ConfigError, match=r"cannot be split into 3 tasks.*tasks can be 1, 2, 5, 10"):
        open_stream(DigitsStream(tasks=3), DataConfig())
    with pytest.raises(ConfigError, match="timm, which the digits cannot have"):
        open_stream(DigitsStream(), DataConfig(augment=TimmAugment()))


def test_another_size_and_augmentation() -> None:
    stream = open_stream(DigitsStream(), DataConfig(image_size=16, augment=CropFlip(padding=2, flip=False)))
    assert stream.image_shape == (1, 16, 16)
    request = Request(np.arange(5), np.arange(5, dtype=np.uint64))
    [images] = stream.load([request])
    assert images.pixels.shape == (5, 1, 16, 16)


def test_is_what_the_trainer_asks_for() -> None:
    stream: Stream = open_stream(DigitsStream(tasks=2), DataConfig())  # checked by mypy
    assert len(stream.tasks) == 2


def test_a_held_out_share_of_the_training_digits() -> None:
    plain = open_stream(DigitsStream(), DataConfig())
    stream = open_stream(DigitsStream(), DataConfig(validation=0.2))
    names = [stream.sample_names(split, np.arange(len(stream.labels(split)))) for split in ("train", "test")]
    assert sorted(names[0] + names[1]) == sorted(plain.sample_names("train", np.arange(len(plain.labels("train")))))
    (shown,) = stream.load([evaluation(range(5))], "test")
    for pixels, name in zip(shown.pixels, names[1], strict=False):
        position = plain.sample_names("train", np.arange(len(plain.labels("train")))).index(name)
        (same,) = plain.load([evaluation(range(position, position + 1))])
        torch.testing.assert_close(pixels, same.pixels[0], rtol=0, atol=0)
