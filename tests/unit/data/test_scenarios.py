from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpccl.config.load import load
from hpccl.data.build import open_stream
from hpccl.data.layout import Collection, Layout, align, arrange, held_out
from hpccl.data.protocols import Split
from hpccl.data.rows import Request
from hpccl.data.scenarios import blurred, drawn_shots, listed_shots, repeated
from hpccl.data.shards.build import build
from hpccl.data.shards.reader import ShardSet
from hpccl.data.stream import ImageStream
from hpccl.errors import ConfigError, DataError
from tests.unit.data.tiny_images import hash_of, image_bytes, pixels, write_folder

Ints = npt.NDArray[np.int64]
FEW = ("stream.tasks=3", "stream.scenario={kind: few_shot, base: 5, way: 2, shots: 5}")


def collection(
    title: str, names: str, *, tasks: int, count: int = 10, widths: tuple[int, ...] | None = None
) -> Collection:
    """`count` training images and two test images a class, classes interleaved as stored."""
    train, test = np.tile(np.arange(len(names)), count), np.tile(np.arange(len(names)), 2)
    labels: dict[Split, Ints] = {"train": train, "test": test}
    groups: dict[Split, Ints] = {"train": train // 2, "test": test // 2}
    keep = None if widths is None else sum(widths)
    return Collection(title, tuple(names), labels, groups, tasks, keep, widths)


def stored(layout: Layout, task: int, split: Split = "train") -> set[tuple[int, int]]:
    """(part, local) of a task's images."""
    span, index = layout.tasks[task].samples(split), layout.index[split]
    pairs = zip(index.part[span.start : span.stop].tolist(), index.local[span.start : span.stop].tolist(), strict=True)
    return set(pairs)


def opened(*arguments: str) -> ImageStream:
    config = load([], list(arguments))
    return open_stream(config.stream, config.data)


# ---------------------------------------------------------------- domains


def test_parts_with_the_same_names_share_their_classes() -> None:
    layout = align([collection("a", "xyz", tasks=1), collection("b", "zyx", tasks=1)], order="given", seed=0)
    assert [task.classes for task in layout.tasks] == [(0, 1, 2), (0, 1, 2)]
    assert [task.name for task in layout.tasks] == ["a", "b"]
    assert layout.class_names == ("x", "y", "z")
    index = layout.index["train"]
    assert [task.samples("train") for task in layout.tasks] == [range(30), range(30, 60)]
    np.testing.assert_array_equal(index.part, np.repeat([0, 1], 30))
    # Of b, class z is stored as 0, 3, 6, ... and is number 2 of the stream.
    np.testing.assert_array_equal(np.sort(index.local[30:][index.label[30:] == 2]), np.arange(0, 30, 3))


def test_a_random_order_of_shared_classes_is_one_for_all_parts() -> None:
    parts = [collection("a", "uvwxyz", tasks=1), collection("b", "zyxwvu", tasks=1)]
    layout = align(parts, order="random", seed=1)
    for split in ("train", "test"):
        index = layout.index[split]
        names = [parts[part].class_names[local % 6] for part, local in zip(index.part, index.local, strict=True)]
        assert names == [layout.class_names[label] for label in index.label]


def test_parts_of_other_classes_are_named() -> None:
    with pytest.raises(DataError, match=r"'b' and 'a' do not have the same classes \(w, z\)"):
        align([collection("a", "xyz", tasks=1), collection("b", "wxy", tasks=1)], order="given", seed=0)


def test_repeated_tasks_have_the_same_images_changed() -> None:
    one = arrange([collection("a", "xyz", tasks=1)], order="given", seed=0)
    layout = repeated(one, 3)
    assert [task.samples("train") for task in layout.tasks] == [range(30), range(30, 60), range(60, 90)]
    assert [task.samples("test") for task in layout.tasks] == [range(6), range(6, 12), range(12, 18)]
    assert stored(layout, 0) == stored(layout, 1) == stored(layout, 2)
    np.testing.assert_array_equal(layout.index["train"].change, np.repeat([0, 1, 2], 30))
    np.testing.assert_array_equal(layout.index["train"].label, np.tile(one.index["train"].label, 3))


@pytest.mark.parametrize("kind", ["permuted", "rotated"])
def test_a_stream_yields_and_shows_changed_images(kind: str) -> None:
    stream = opened("stream.tasks=3", f"stream.scenario.kind={kind}")
    size, sample = len(stream.tasks[0].train), 17
    plain, changed = stream.raw(sample), stream.raw(size + sample)
    assert (plain != changed).any()
    if kind == "permuted":
        np.testing.assert_array_equal(np.sort(plain, axis=None), np.sort(changed, axis=None))
    names = stream.sample_names("train", np.array([sample, size + sample, 2 * size + sample]))
    assert names[1:] == [f"{names[0]}@2", f"{names[0]}@3"]
    assert stream.fingerprint != opened("stream.tasks=3", f"stream.scenario.kind={kind}", "stream.tasks=2").fingerprint
    asked = Request(np.array([sample, size + sample]), np.zeros(2, dtype=np.uint64))
    (images,) = stream.load([asked])
    np.testing.assert_allclose(images.pixels[1, 0].numpy(), changed[:, :, 0] / 127.5 - 1, atol=1e-6)
    np.testing.assert_allclose(images.pixels[0, 0].numpy(), plain[:, :, 0] / 127.5 - 1, atol=1e-6)


def test_what_a_changed_task_tests_on_no_task_trains_on() -> None:
    stream = opened("stream.tasks=3", "stream.scenario.kind=rotated", "data.validation=0.2")
    for trained in range(3):
        for tested in range(3):
            assert not stored(stream.layout, trained) & stored(stream.layout, tested, "test")


# ---------------------------------------------------------------- blurry


def test_a_tenth_of_every_blurry_class_is_dealt_out_evenly() -> None:
    whole = arrange([collection("s", "abcdef", tasks=3, count=40)], order="given", seed=0)
    layout = blurred(whole, blur=0.1, disjoint=0.0, seed=0)  # Blurry10
    train = layout.index["train"]
    assert stored(layout, 0) | stored(layout, 1) | stored(layout, 2) == set.union(*(stored(whole, t) for t in range(3)))
    for task in layout.tasks:
        counts = np.bincount(train.label[task.train.start : task.train.stop], minlength=6)
        home = whole.tasks[task.index].classes
        for label in range(6):
            assert counts[label] == (36 if label in home else 2)  # 10 % of 40 over two other tasks
        assert task.classes == tuple(range(6))
        assert task.test == whole.tasks[task.index].test
        assert (np.diff(train.label[task.train.start : task.train.stop]) >= 0).all()
    assert layout.index["test"] is whole.index["test"]


def test_disjoint_classes_stay_whole() -> None:
    whole = arrange([collection("s", "abcdefgh", tasks=2, count=20)], order="given", seed=0)
    layout = blurred(whole, blur=0.3, disjoint=0.5, seed=0)  # i-Blurry-50-30
    train = layout.index["train"]
    away = []
    for label in range(8):
        home = label // 4
        here = layout.tasks[home].train
        own = int((train.label[here.start : here.stop] == label).sum())
        assert own in (20, 14)
        away += [label] if own == 14 else []
        assert (label in layout.tasks[1 - home].classes) == (own == 14)
    assert sorted(label // 4 for label in away) == [0, 0, 1, 1]  # half of each task's classes


@given(st.floats(0.01, 0.99), st.floats(0.0, 1.0), st.integers(0, 9), st.sampled_from([2, 3, 6]))
def test_blurring_loses_no_image_and_follows_the_seed(blur: float, disjoint: float, seed: int, tasks: int) -> None:
    parts = [collection("s", "abcdef", tasks=tasks, count=7), collection("t", "uvw", tasks=1, count=7)]
    whole = arrange(parts, order="given", seed=0)
    width = 6 // tasks
    if round(7 * blur) == 0 or round(disjoint * width) == width:
        with pytest.raises(ConfigError, match=r"leave every image with its task: .* set disjoint lower"):
            blurred(whole, blur=blur, disjoint=disjoint, seed=seed)
        return
    layout = blurred(whole, blur=blur, disjoint=disjoint, seed=seed)
    index = layout.index["train"]
    assert len({*zip(index.part.tolist(), index.local.tolist(), strict=True)}) == len(whole.index["train"])
    assert [task.train.start for task in layout.tasks[1:]] == [task.train.stop for task in layout.tasks[:-1]]
    assert stored(layout, tasks) == stored(whole, tasks)  # another data set has no part in it
    for task in layout.tasks:
        assert set(index.label[task.train.start : task.train.stop].tolist()) == set(task.classes)
        assert set(whole.tasks[task.index].classes) <= set(task.classes)
    again = blurred(whole, blur=blur, disjoint=disjoint, seed=seed)
    np.testing.assert_array_equal(again.index["train"].local, index.local)


def test_another_seed_blurs_other_images() -> None:
    one, same, other = (opened("stream.scenario.kind=blurry", f"stream.scenario.seed={n}", "seed=5") for n in (0, 0, 1))
    assert stored(one.layout, 0) == stored(same.layout, 0) != stored(other.layout, 0)
    assert one.fingerprint == same.fingerprint != other.fingerprint


# ---------------------------------------------------------------- few shots


def test_sessions_have_a_few_images_of_new_classes() -> None:
    stream = opened(*FEW)
    assert [task.classes for task in stream.tasks] == [(0, 1, 2, 3, 4), (5, 6), (7, 8)]
    assert stream.class_names == tuple("012345678")
    whole = opened("stream.tasks=1")
    labels = whole.labels("train")
    assert len(stream.tasks[0].train) == int((labels < 5).sum())
    for task in stream.tasks[1:]:
        counts = np.bincount(stream.labels("train")[task.train.start : task.train.stop], minlength=9)
        assert counts[list(task.classes)].tolist() == [5, 5]
        assert counts.sum() == 10
    # Tests are on all test images of a session's classes.
    tested = np.bincount(whole.labels("test"))
    assert [len(task.test) for task in stream.tasks] == [tested[:5].sum(), tested[5:7].sum(), tested[7:9].sum()]


def test_the_shots_follow_the_scenario_s_seed_alone() -> None:
    one, same, other = (opened(*FEW, *more) for more in ((), ("seed=3", "train.epochs=2"), ("stream.scenario.seed=1",)))
    assert stored(one.layout, 1) == stored(same.layout, 1) != stored(other.layout, 1)
    assert stored(one.layout, 0) == stored(other.layout, 0)
    more = opened(*FEW[:1], "stream.scenario={kind: few_shot, base: 5, way: 2, shots: 9}")
    assert stored(one.layout, 2) < stored(more.layout, 2)


def test_sessions_are_validated_on_images_beyond_their_shots() -> None:
    stream = opened(*FEW, "data.validation=0.2")
    whole = opened("stream.tasks=1", "data.validation=0.2")
    tested = np.bincount(whole.labels("test"))
    assert [len(task.test) for task in stream.tasks] == [tested[:5].sum(), tested[5:7].sum(), tested[7:9].sum()]
    assert not stored(stream.layout, 1) & stored(stream.layout, 1, "test")
    assert len(stream.tasks[1].train) == 10


def sessions(count: int = 10) -> Layout:
    return arrange([collection("s", "abcde", tasks=3, count=count, widths=(3, 1, 1))], order="given", seed=0)


def lists(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        (folder / f"{name}.txt").write_text(text)
    return folder


def numbers(local: np.ndarray) -> list[str]:
    return [f"c-000/{number:05d}" for number in local]


def test_listed_images_are_those_of_the_sessions(tmp_path: Path) -> None:
    # Class d is stored at 3, 8, 13, ..., class e at 4, 9, 14, ...
    lists(tmp_path, session_2="3\n48\n", session_3="some/folder/00009.jpg\n\n 4 \n")
    layout = listed_shots(sessions(), tmp_path, numbers, shots=2)
    assert stored(layout, 0) == stored(sessions(), 0)
    assert stored(layout, 1) == {(0, 3), (0, 48)}
    assert stored(layout, 2) == {(0, 4), (0, 9)}
    lists(tmp_path, session_1="0\n1\n2\n")
    assert stored(listed_shots(sessions(), tmp_path, numbers, shots=2), 0) == {(0, 0), (0, 1), (0, 2)}


def test_the_same_name_in_two_classes_is_told_apart_by_the_folder(tmp_path: Path) -> None:
    lists(tmp_path, session_2="images/d/1.jpg\n", session_3="images/e/1.jpg\n")
    layout = listed_shots(sessions(), tmp_path, lambda local: [f"c/{number // 5}" for number in local], shots=1)
    assert (stored(layout, 1), stored(layout, 2)) == ({(0, 8)}, {(0, 9)})


@pytest.mark.parametrize("name", ["img.001.jpg", "photo (1).PNG", "a b[2].jfif", "猫1.webp", "long" * 50 + ".png"])
def test_an_image_may_be_listed_by_the_name_that_it_had(tmp_path: Path, name: str) -> None:
    """Shards have it without the characters that break a tar."""
    source = write_folder(tmp_path / "source", {f"c/{name}": image_bytes(pixels(0), "png")})
    build(source, tmp_path / "shards")
    (stored_as,) = ShardSet.open(tmp_path / "shards", "train").names(np.arange(1))
    lists(tmp_path, session_2=f"d/{name}\n", session_3="4\n")

    def names(local: np.ndarray) -> list[str]:
        return [stored_as if number == 3 else f"c/{number}" for number in local]

    assert stored(listed_shots(sessions(), tmp_path, names, shots=1), 1) == {(0, 3)}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"session_2": "3\n8\n"}, r"session_3.txt' cannot be read: No such file or directory; .* a training image a"),
        ({"session_2": "3\n4\n", "session_3": "9\n"}, r"lists '4', an image of class 'e', which session 2 does not"),
        ({"session_2": "3\n77\n", "session_3": "9\n"}, r"lists '77', which names 0 of the training images"),
        ({"session_2": "3\n03\n", "session_3": "9\n"}, r"lists '03' twice"),
        ({"session_2": "3\n", "session_3": "4\n9\n"}, r"session_2.txt' lists 1 images of class 'd', but .*shots=2"),
    ],
)
def test_wrong_lists_say_what_is_wrong(tmp_path: Path, files: dict[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        listed_shots(sessions(), lists(tmp_path, **files), numbers, shots=2)


def test_more_shots_or_classes_than_there_are() -> None:
    with pytest.raises(ConfigError, match=r"class 'd' has 4 training images, of which stream\.scenario\.shots=5 are"):
        drawn_shots(sessions(count=4), shots=5, seed=0)


def test_a_stream_reads_lists_of_the_digits(tmp_path: Path) -> None:
    drawn = opened(*FEW)
    for task in drawn.tasks[1:]:
        names = drawn.sample_names("train", np.arange(task.train.start, task.train.stop))
        lists(tmp_path, **{f"session_{task.index + 1}": "\n".join(name.rpartition("/")[2] for name in names)})
    listed = opened(*FEW, f"stream.scenario.lists={tmp_path}")
    for number in (0, 1, 2):
        assert stored(listed.layout, number) == stored(drawn.layout, number)
    assert listed.fingerprint == drawn.fingerprint


def test_held_out_and_shots_are_decided_apart() -> None:
    layout = drawn_shots(held_out(sessions(), 0.2), shots=3, seed=0)
    assert [len(task.train) for task in layout.tasks] == [24, 3, 3]
    assert [len(task.test) for task in layout.tasks] == [6, 2, 2]


def test_listed_images_are_not_held_out(tmp_path: Path) -> None:
    """Of ten images a class: two are tested on, others than the two that are listed, whichever these are."""
    for listed in ("3\n8\n", "43\n48\n"):
        lists(tmp_path, session_2=listed, session_3="4\n49\n")
        layout = listed_shots(sessions(), tmp_path, numbers, shots=2, validation=0.2)
        assert stored(layout, 1) == {(0, int(number)) for number in listed.split()}
        tested = layout.tasks[1].test
        held = set(layout.index["test"].local[tested.start : tested.stop].tolist())
        assert len(held) == 2
        assert not held & {int(number) for number in listed.split()}
        assert [len(task.train) for task in layout.tasks] == [24, 2, 2]
        assert [len(task.test) for task in layout.tasks] == [6, 2, 2]
    lists(tmp_path, session_1="\n".join(str(number) for number in range(50) if number % 5 < 3))  # as TOPIC's have it
    layout = listed_shots(sessions(), tmp_path, numbers, shots=2, validation=0.2)
    assert [len(task.train) for task in layout.tasks] == [24, 2, 2]
    assert [len(task.test) for task in layout.tasks] == [6, 2, 2]
    with pytest.raises(ConfigError, match=r"class 'd' has 10 training images, 2 of them listed; data.validation=0.9"):
        listed_shots(sessions(), tmp_path, numbers, shots=2, validation=0.9)


# ---------------------------------------------------------------- shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two data sets of the same four classes, and one of large images."""
    folder = tmp_path_factory.mktemp("shards")
    for name, side in (("one", 16), ("two", 16), ("large", 80)):
        files = {}
        for path in [f"{split}/{label}/{n}.png" for split in ("train", "test") for label in "abcd" for n in range(6)]:
            files[path] = image_bytes(pixels(hash_of(name + path), side, side), "png")
        build(write_folder(folder / "images" / name, files), folder / name, samples_per_shard=4)
    return folder


def of_shards(
    shards: Path, *names: str, tasks: int = 1, scenario: str, cache: Path, more: tuple[str, ...] = ()
) -> ImageStream:
    parts = ", ".join(f"{{path: {shards / name}, tasks: {tasks}}}" for name in names)
    return opened(f"stream={{kind: shards, parts: [{parts}], scenario: {scenario}}}", f"data.cache={cache}", *more)


def test_domains_with_other_held_out_images_are_other_data(shards: Path, tmp_path: Path) -> None:
    """A run of a version that held out otherwise is not continued."""
    streams = [
        of_shards(shards, "one", "two", scenario="{kind: domains}", cache=tmp_path, more=more)
        for more in ((), ("data.validation=0.2",), ("data.validation=0.5",))
    ]
    assert len({stream.fingerprint for stream in streams}) == 3


def test_data_sets_of_the_same_classes_are_domains(shards: Path, tmp_path: Path) -> None:
    stream = of_shards(shards, "one", "two", scenario="{kind: domains}", cache=tmp_path)
    assert [(task.name, task.classes) for task in stream.tasks] == [("one", (0, 1, 2, 3)), ("two", (0, 1, 2, 3))]
    assert stream.class_names == tuple("abcd")
    assert stream.sample_names("train", np.array([0, 24]))[1].startswith("two/")
    np.testing.assert_array_equal(stream.labels("train"), np.tile(np.repeat(np.arange(4), 6), 2))


def test_images_in_shards_are_changed_once_they_are_decoded(shards: Path, tmp_path: Path) -> None:
    stream = of_shards(shards, "one", tasks=2, scenario="{kind: rotated, degrees: 180, angles: even}", cache=tmp_path)
    np.testing.assert_array_equal(stream.raw(24 + 5), np.rot90(stream.raw(5)))
    with pytest.raises(ConfigError, match=r"stream\.scenario\.kind=permuted changes decoded images"):
        of_shards(shards, "large", tasks=2, scenario="{kind: permuted}", cache=tmp_path)


def test_lists_name_images_in_shards(shards: Path, tmp_path: Path) -> None:
    lists(tmp_path, session_2="train/c/4.png\ntrain/c/1.png\n", session_3="train/d/0.png\ntrain/d/1.png\n")
    scenario = f"{{kind: few_shot, base: 2, way: 1, shots: 2, lists: {tmp_path}}}"
    stream = of_shards(shards, "one", tasks=3, scenario=scenario, cache=tmp_path)
    names = [stream.sample_names("train", np.arange(task.train.start, task.train.stop)) for task in stream.tasks]
    assert [len(each) for each in names] == [12, 2, 2]
    assert [name.rpartition("/")[2] for name in names[1]] == ["1", "4"]
    assert stream.labels("train")[12:].tolist() == [2, 2, 3, 3]
    with pytest.raises(ConfigError, match=r"are 5 classes, but 'one' has 4"):
        of_shards(shards, "one", tasks=3, scenario="{kind: few_shot, base: 3, way: 1, shots: 2}", cache=tmp_path)
