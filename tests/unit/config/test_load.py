from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpccl.config.engine import AnyEngine, DeepspeedEngine, Fsdp2Engine
from hpccl.config.load import dump, is_override, load, load_recorded, sweep
from hpccl.config.machine import SlurmCluster
from hpccl.config.memory import ScoreSelector
from hpccl.config.model import MlpModel, PaperModel, TimmModel
from hpccl.config.optim import TimmOptim
from hpccl.config.run import RunConfig
from hpccl.config.stream import ShardStream
from hpccl.errors import ConfigError

NEEDS_MEMORY = "needs a memory; set memory.size to the examples kept of each task, or memory.total"


CONFIGS = Path(__file__).parents[3] / "configs"


def write(folder: Path, text: str, name: str = "a.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def mistakes(files: list[Path], *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(files, overrides)
    return str(caught.value).splitlines()


# ---------------------------------------------------------------- reading and merging


def test_nothing_is_the_defaults() -> None:
    assert load([], []) == RunConfig()


def test_yaml_1_2_scalars(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
model:
  kind: timm
  name: no
  options: {time: 12:30:00, rate: 1e-3, on: yes, day: 2026-01-31, octal: 017, none: null, nested: [1, {a: true}]}
optim: {lr: 1e-3}
""",
    )
    config = load([path], [])
    assert isinstance(config.model, TimmModel)
    assert config.model.name == "no"
    assert config.model.options == {
        "time": "12:30:00",
        "rate": 1e-3,
        "on": "yes",
        "day": "2026-01-31",
        "octal": 17,
        "none": None,
        "nested": [1, {"a": True}],
    }
    assert config.optim.lr == (1e-3,)


def test_later_files_win_and_arguments_win_over_files(tmp_path: Path) -> None:
    first = write(tmp_path, "train: {epochs: 1, batch_size: 8}\nseed: 1\n")
    second = write(tmp_path, "train:\n  epochs: [2, 3]\n", "b.yaml")
    config = load([first, second], ["seed=5", "seed=6"])
    assert (config.train.epochs, config.train.batch_size, config.seed) == ((2, 3), 8, 6)


def test_an_empty_file_says_nothing(tmp_path: Path) -> None:
    assert load([write(tmp_path, "# nothing\n")], ["name=run"]) == RunConfig()


def test_the_name_is_that_of_the_files(tmp_path: Path) -> None:
    one, two = write(tmp_path, "", "quick start.yaml"), write(tmp_path, "", "ewc+fr.yaml")
    assert load([one, two], []).name == "quick-start-ewc+fr"
    assert load([one, two], ["name=mine"]).name == "mine"


def test_a_mapping_whose_kind_changes_starts_afresh(tmp_path: Path) -> None:
    path = write(tmp_path, "model: {kind: cifarnet, dropout: false}\n")
    assert load([path], []).model == PaperModel(kind="cifarnet", dropout=False)
    assert load([path], ["model.kind=vgg_small"]).model == PaperModel(kind="vgg_small")
    assert load([path], ["model.kind=cifarnet"]).model == PaperModel(kind="cifarnet", dropout=False)


@pytest.mark.parametrize("engine", sorted((CONFIGS / "engine").glob("*.yaml")), ids=lambda path: path.stem)
def test_another_engine_computes_the_same(engine: Path) -> None:
    chosen = load([CONFIGS / "imagenet_10x100.yaml", engine], []).engine
    assert (chosen.precision, chosen.channels_last) == ("bf16", True)


def test_keys_that_stay_are_those_of_every_engine(tmp_path: Path) -> None:
    assert AnyEngine.lasting == set(AnyEngine.model_fields)
    path = write(tmp_path, "engine: {compile: true, precision: bf16, recompute: true}\n")
    assert load([path], ["engine.kind=fsdp2"]).engine == Fsdp2Engine(precision="bf16", recompute=True)
    assert load([path], ["engine=deepspeed"]).engine == DeepspeedEngine(precision="bf16", recompute=True)


def test_the_default_kind_is_a_kind(tmp_path: Path) -> None:
    path = write(tmp_path, "model: {hidden: [3]}\n")
    assert load([path], []).model == MlpModel(hidden=(3,))
    assert load([path], ["model.kind=timm", "model.name=resnet18"]).model == TimmModel(name="resnet18")


def test_a_kind_may_stand_after_its_keys() -> None:
    expected = TimmModel(name="resnet18")
    assert load([], ["model.name=resnet18", "model.kind=timm"]).model == expected


def test_values_of_arguments_are_yaml() -> None:
    config = load(
        [],
        ["folder=", "data.mean=[.1, .2, .3]", "data.std=[1, 1, 1]", "optim.options={betas: [0.9, 0.99]}"],
    )
    assert config.folder is None
    assert config.data.mean == (0.1, 0.2, 0.3)
    assert isinstance(config.optim, TimmOptim)
    assert config.optim.options == {"betas": [0.9, 0.99]}


def test_lists_of_slurm_are_one_value() -> None:
    words = ["cluster.exclude=n1,n2", "cluster.partition=gpu,long", "cluster.constraint=a100,ib"]
    (config,) = sweep([], ["cluster.kind=slurm", *words, "cluster.extra.mail-type=FAIL,END", "folder=runs/a"])
    assert config == load([], ["cluster.kind=slurm", *words, "cluster.extra.mail-type=FAIL,END", "folder=runs/a"])
    assert isinstance(config.cluster, SlurmCluster)
    assert (config.cluster.exclude, config.cluster.partition) == ("n1,n2", "gpu,long")
    assert config.cluster.extra == {"mail-type": "FAIL,END"}
    assert config.path == "runs/a"


def test_an_item_of_a_list_can_be_changed(tmp_path: Path) -> None:
    path = write(tmp_path, "stream: {kind: shards, parts: [{path: a}, {path: b, tasks: 5}]}\n")
    stream = load([path], ["stream.parts.1.path=/elsewhere"]).stream
    assert isinstance(stream, ShardStream)
    assert [(part.path, part.tasks) for part in stream.parts] == [("a", 1), ("/elsewhere", 5)]
    assert mistakes([path], "stream.parts.2.path=c") == [
        "item 2: the list has 2 items, counted from 0 (argument 'stream.parts.2.path=c')"
    ]


def test_arguments_and_files_are_told_apart() -> None:
    assert is_override("train.epochs=3")
    assert is_override("folder=a=b.yaml")
    assert is_override("cluster.extra.mail-type=FAIL")
    assert not is_override("./a=b.yaml")
    assert not is_override("configs/a.yaml")


# ---------------------------------------------------------------- dump


def test_a_runs_configuration_that_was_cut_off(tmp_path: Path) -> None:
    whole = dump(load([], ["seed=5"]))
    path = tmp_path / "config.yaml"
    path.write_text(whole)
    assert load_recorded(path).seed == 5
    for text in ("", whole[: whole.index("engine:")]):
        path.write_text(text)
        with pytest.raises(ConfigError, match=r"config.yaml' is empty or cut off .*'cluster' is missing"):
            load_recorded(path)


def test_dump_loads_back(tmp_path: Path) -> None:
    stream = "stream={kind: shards, parts: [{path: 'a: b', tasks: 5}]}"
    config = load([], [stream, "optim.lr=[1e-5, 3]", "folder=12:30:00", "memory.size=7", "memory.mix.kind=stratified"])
    assert load([write(tmp_path, dump(config))], []) == config


@pytest.mark.slow
@given(
    text=st.text(min_size=1),
    number=st.floats(min_value=1e-30, max_value=1e30),
    options=st.dictionaries(
        st.text(min_size=1), st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
    ),
)
def test_dump_loads_back_whatever_it_holds(
    tmp_path_factory: pytest.TempPathFactory, text: str, number: float, options: dict[str, object]
) -> None:
    config = RunConfig.model_validate({"data": {"cache": text}, "optim": {"lr": number, "options": options}})
    path = tmp_path_factory.mktemp("dump") / "a.yaml"
    path.write_text(dump(config), encoding="utf-8", newline="")
    assert load([path], []) == config


# ---------------------------------------------------------------- mistakes


def test_all_mistakes_at_once_with_their_places(tmp_path: Path) -> None:
    first = write(
        tmp_path,
        """train:
  epohcs: 3
  batch_size: -4
  clip_norm: yes
model:
  kind: tim
prior:
  replay: 0.5
stream:
  kind: shards
  parts:
    - {path: x, taks: 3}
""",
    )
    second = write(tmp_path, "seed: 1\nseed: 2\n", "b.yaml")
    found = mistakes([first, second], "lr=3", "train.ema=2")
    assert sorted(found) == sorted(
        [
            f"seed: given twice; keep one ({second}:2)",
            f"stream.parts.0.taks = 3: no such key; did you mean 'stream.parts.0.tasks'? ({first}:12)",
            f"model.kind = tim: no such kind; kinds: cifarnet, vgg_small, mlp, timm ({first}:6)",
            f"train.batch_size = -4: not allowed; expected a whole number > 0 ({first}:3)",
            f"train.clip_norm = yes: not allowed; expected a number > 0 or null ({first}:4)",
            "train.ema = 2: not allowed; expected a number > 0 and < 1 or null (argument 'train.ema=2')",
            f"train.epohcs = 3: no such key; did you mean 'train.epochs'? ({first}:2)",
            "lr = 3: no such key; did you mean 'optim.lr'? (argument 'lr=3')",
            f"prior.replay = 0.5 with memory.size = 0: {NEEDS_MEMORY} ({first}:8)",
        ]
    )


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("seed=true", "seed = true: not allowed; expected a whole number >= 0"),
        ("seed=1.0", "seed = 1.0: not allowed; expected a whole number >= 0"),
        ("seed=18446744073709551616", "seed = 18446744073709551616: not allowed; expected a whole number >= 0 and <= "),
        (
            "stream.order_seed=18446744073709551616",
            "stream.order_seed = 18446744073709551616: not allowed; expected a whole number",
        ),
        ("optim.lr=.nan", "optim.lr = nan: not allowed; expected a number > 0"),
        ("train.epochs=[1,x]", "train.epochs.1 = x: not allowed; expected a whole number > 0, or a list with one"),
        ("train.epochs=[]", "train.epochs = []: not allowed; expected a whole number > 0, or a list with one"),
        ("optim.lr=0", "optim.lr = 0: not allowed; expected a number > 0"),
        ("optim.lr=.inf", "optim.lr = inf: not allowed; expected a number > 0"),
        ("optim.schedule=linear", "optim.schedule = linear: not allowed; expected one of constant, cosine, onecycle"),
        (
            "memory=3",
            "memory = 3: not allowed; expected a mapping of size, total, fraction, selector, balanced, dtype, labels",
        ),
        ("stream=null", "stream = null: not allowed; expected a mapping with a kind: digits, shards"),
        (
            "stream.kind=shards",
            "stream.parts is missing; expected a list (each item: a mapping of path, tasks, classes",
        ),
        ("model.kind=timm", "model.name is missing; expected text"),
        ("engine.kind=fsdp", "engine.kind = fsdp: no such kind; kinds: ddp"),
        ("stream={kind: [1]}", "stream.kind = [1]: no such kind; kinds: digits, shards"),
        (
            "stream={kind: shards, parts: [3]}",
            "stream.parts.0 = 3: not allowed; expected a list (each item: a mapping of path",
        ),
        ("name=a b", "name = 'a b': not allowed; expected text matching"),
        ("memry.size=3", "memry = {size: 3}: no such key; did you mean 'memory'?"),
        ("memory.mix.share=.5", "memory.mix.share = 0.5: no such key; it belongs to memory.mix.kind=stratified"),
        ("options={}", "options = {}: no such key; did you mean 'model.options' (of model.kind=timm)?"),
        ("train.zzz=1", "train.zzz = 1: no such key; allowed: epochs, batch_size, head"),
        ("memory.size=[1", "expected ',' or ']', but got '<stream end>': not valid YAML"),
        ("train={epochs: 1, epochs: 2}", "epochs: given twice; keep one"),
        ("seed=!!python/name:os.system x", "python/name:os.system: tags are not supported; write the plain value"),
        ("optim.options=&a [*a]", "&a: anchors and aliases are not supported; write the value out"),
    ],
)
def test_one_mistake(argument: str, line: str) -> None:
    found = mistakes([], argument)
    assert len(found) == 1
    assert found[0].startswith(line)
    assert f"(argument '{argument}')" in found[0]


def test_a_clash_shows_the_default_of_the_kind_that_was_chosen() -> None:
    (found,) = mistakes([], "prior.normal.precision=1", "optim.kind=vogn")
    assert found.startswith("optim.prior_precision = 50.0 with prior.normal.precision = 1: would pull the weights to 0")


def test_the_line_of_a_syntax_error(tmp_path: Path) -> None:
    path = write(tmp_path, "seed: 1\ntrain: {epochs: 3\nname: x\n")
    assert mistakes([path])[0].endswith(f"not valid YAML ({path}:3)")


def test_what_is_nested_too_deeply(tmp_path: Path) -> None:
    path = write(tmp_path, "optim: " + "[" * 5000 + "]" * 5000)
    assert mistakes([path]) == [f"nested too deeply to be read; no setting needs that ({path})"]
    assert mistakes([], "optim=" + "{a: " * 5000 + "1" + "}" * 5000)[0].startswith("nested too deeply to be read")
    keys = ".".join("a" * 3000)
    assert mistakes([], f"{keys}=1")[0].startswith(f"'{keys[:50]}")


def test_a_tab_is_a_syntax_error(tmp_path: Path) -> None:
    path = write(tmp_path, "train:\n\tepochs: 3\n")
    assert f"not valid YAML ({path}:2)" in mistakes([path])[0]


def test_files_that_cannot_be_configurations(tmp_path: Path) -> None:
    write(tmp_path, "", "quickstart.yaml")
    missing = tmp_path / "quikstart.yaml"
    assert mistakes([missing]) == [f"'{missing}': no such file; did you mean '{tmp_path / 'quickstart.yaml'}'?"]
    assert "holds a list; expected a mapping" in mistakes([write(tmp_path, "- 1\n", "list.yaml")])[0]
    assert "holds the value 'text'" in mistakes([write(tmp_path, "text\n", "text.yaml")])[0]
    binary = tmp_path / "x.png"
    binary.write_bytes(b"\x89PNG\xff")
    assert "is not UTF-8 text" in mistakes([binary])[0]
    assert "cannot be read: Is a directory" in mistakes([tmp_path])[0]


def test_every_broken_file_is_told(tmp_path: Path) -> None:
    found = mistakes([tmp_path / "no.yaml", write(tmp_path, "a: [\n")], "seed=[")
    assert len(found) == 3


def test_what_is_no_assignment() -> None:
    assert mistakes([], "seed") == ["'seed' is not dotted.key=value"]


def test_a_wrong_key_does_not_cause_other_complaints() -> None:
    found = mistakes([], "memory.size=many", "prior.replay=1")
    assert found == ["memory.size = many: not allowed; expected a whole number >= 0 (argument 'memory.size=many')"]


# ---------------------------------------------------------------- sweep


def test_sweep_axes_make_a_grid_in_own_folders() -> None:
    configs = sweep([], ["seed=0,1", "optim.lr=1e-3,[1e-3,1e-4]", "name=grid"])
    assert [(config.seed, config.optim.lr) for config in configs] == [
        (0, (1e-3,)),
        (0, (1e-3, 1e-4)),
        (1, (1e-3,)),
        (1, (1e-3, 1e-4)),
    ]
    assert configs[0].path == "runs/grid/seed=0,optim.lr=1e-3"
    assert len({config.path for config in configs}) == 4


def test_without_axes_there_is_one_run() -> None:
    assert sweep([], ["train.epochs=[1,2]"]) == [load([], ["train.epochs=[1,2]"])]


def test_quotes_and_brackets_protect_commas() -> None:
    assert [config.folder for config in sweep([], ["folder='a,b',c"])] == ["a,b", "c"]
    assert len(sweep([], ["optim.options={a: [1, 2], b: 'x, y'}"])) == 1
    assert len(sweep([], ["folder=it's,that's"])) == 2


def test_long_values_are_cut_in_the_names_of_folders() -> None:
    paths = [config.path for config in sweep([], [f"data.cache={'a' * 150}/1,{'a' * 150}/2", "memory.dtype=fp32,bf16"])]
    long = [config.path for config in sweep([], [f"data.cache={'a' * 300}/1,{'a' * 300}/2"])]
    assert len({*paths, *long}) == 6
    assert all(len(Path(path).name.encode()) <= 255 for path in [*paths, *long])
    assert len(Path(long[0]).name) == 200


def test_a_swept_name_or_folder_is_the_folder() -> None:
    assert [config.path for config in sweep([], ["name=a,b"])] == ["runs/a", "runs/b"]
    assert [config.path for config in sweep([], ["folder=x", "seed=1,2"])] == ["x/seed=1", "x/seed=2"]


def test_a_sweep_tells_the_mistakes_of_all_its_points() -> None:
    with pytest.raises(ConfigError) as caught:
        sweep([], ["seed=0,x,-1", "memry=1"])
    assert len(str(caught.value).splitlines()) == 3


def test_a_sweep_refuses_runs_that_would_share_a_folder() -> None:
    with pytest.raises(ConfigError, match="given twice"):
        sweep([], ["seed=1,1"])
    with pytest.raises(ConfigError, match="share a folder"):
        sweep([], ["data.cache=a b,a/b"])


@pytest.mark.parametrize("text", ["0.5,0.5,0.5", "0.485,0.456,0.406"])
def test_a_sweep_that_was_meant_as_a_list_says_how_to_write_one(text: str) -> None:
    with pytest.raises(ConfigError, match=rf"commas make a sweep.* write data.mean=\[{text}\]"):
        sweep([], [f"data.mean={text}"])


def test_load_refuses_a_sweep() -> None:
    assert mistakes([], "seed=1,2") == ["seed=1,2 is a sweep, but one run is expected here (a list is written [1,2])"]


# ---------------------------------------------------------------- fast, without torch


def test_loading_needs_no_torch() -> None:
    code = """
import sys
from hpccl.config.load import dump, load
dump(load([], ["memory.size=3", "optim.lr=0.1"]))
try:
    load([], ["memry.size=3", "optim.lr=0"])
except Exception as error:
    assert "memory" in str(error)
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_a_kind_alone_stands_for_its_section(tmp_path: Path) -> None:
    """In a file as in an argument, before or after the keys of that kind; old files say `selector: uniform`."""
    path = tmp_path / "run.yaml"
    path.write_text("memory:\n  selector: uniform\ncurvature: diagonal\n")
    config = load([path], [])
    assert config.memory.selector.kind == "uniform"
    assert config.curvature.kind == "diagonal"
    arguments = ["memory.selector=gini", "memory.selector.sampled=true"]
    for order in (arguments, arguments[::-1]):
        assert load([path], order).memory.selector == ScoreSelector(kind="gini", sampled=True)
    assert load([path], ["memory.selector.kind=gini"]) == load([path], ["memory.selector=gini"])
    (line,) = mistakes([path], "memory.selector=ginni")
    assert line.startswith("memory.selector = ginni: not allowed; expected a mapping with a kind: error, gini, greedy")
