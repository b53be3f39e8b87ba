"""Random choices of one run are told apart by the word that is hashed for each purpose."""

from __future__ import annotations

from hpccl.gp import inducing
from hpccl.train import consolidate, functional, kept, reconstruction, topology, uncertainty
from hpccl.train.memory_map import build

WORDS = {
    consolidate: ("_SELECT", "_REPLAY", "_SUBSAMPLE"),
    kept: ("_HELD", "_ARRIVAL", "_EVICTION"),
    reconstruction: ("_SUBSAMPLE",),
    topology: ("_START", "_ORDER"),
    build: ("_SUBSAMPLE", "_CURVATURE"),
    uncertainty: ("_SUBSAMPLE", "_NOISE"),
    functional: ("_BLOCKS",),
    inducing: ("_GUMBEL",),
}


def test_no_two_purposes_have_one_word() -> None:
    """Or a uniform sample of the examples would be the ones that were held out by the same hash."""
    words = [getattr(module, name) for module, names in WORDS.items() for name in names]
    assert len(set(words)) == len(words)
