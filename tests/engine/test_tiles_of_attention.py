"""Tiles of attention: each query is in one of them, and they leave out no visible key and few hidden ones."""

import numpy as np
import pytest

from refimpl import backend
from refimpl._engine.arguments import prepare
from refimpl._engine.visibility import visible
from refimpl._options import AttentionOptions

BATCH, HEADS, ROWS, KEYS = 3, 2, 300, 520
PAIRS = BATCH * HEADS * ROWS * KEYS
OPTIONS = {
    "plain": ({}, 1.0),
    "causal": ({"is_causal": True}, 0.45),
    "causal, aligned at the ends": ({"is_causal": True, "query_offset": KEYS - ROWS}, 0.85),
    "window": ({"window": (20, 20)}, 0.25),
    "no key beyond": ({"window": (None, -0), "query_offset": -150}, 0.25),
    "lengths": ({"key_lengths": np.array([10, 0, 520])}, 0.35),
    "lengths and window": ({"key_lengths": np.array([10, 200, 520]), "window": (20, 20)}, 0.25),
    "offsets": ({"query_offset": np.array([0, 100, 220]), "is_causal": True}, 1.0),
}


def prepared(options):
    rng = np.random.default_rng(0)
    query, key = rng.normal(size=(BATCH, HEADS, ROWS, 4)), rng.normal(size=(BATCH, HEADS, KEYS, 4))
    return prepare(
        backend.of(query), {"query": query, "key": key}, (BATCH, HEADS, ROWS, KEYS), AttentionOptions(**options)
    )


@pytest.mark.parametrize(("options", "share"), OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("tile_bytes", [1, 1 << 16, 1 << 24])
def test_tiles(options, share, tile_bytes):
    call = prepared(options)
    whole = tuple(slice(0, n) for n in call.space)
    due = np.ones((*call.space, KEYS), bool)
    if call.has_hidden_pairs:
        due &= visible(call, whole, slice(0, KEYS))
    times, found, computed = np.zeros(call.space, int), np.zeros_like(due), 0
    with backend.limits(tile_bytes=tile_bytes):
        tiles = list(call.tiles(1))
    for tile in tiles:
        times[tile] += 1
        keys = call.visible_keys(tile)
        if keys is not None:
            found[(*tile, keys)] = True
            computed += found[(*tile, keys)].size
            if call.all_visible(tile, keys):
                assert due[(*tile, keys)].all()
    assert (times == 1).all()
    assert not (due & ~found).any()
    assert computed <= share * PAIRS
