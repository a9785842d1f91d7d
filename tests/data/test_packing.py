"""Packed rows: nothing lost, nothing twice, no piece of two documents, sources mixed by weight, any order of access."""

from __future__ import annotations

import tempfile
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from made_stores import END, write_stores
from persimmon.data.packing import IGNORE, PackedRows, Row
from persimmon.data.tokens import TokenStore
from persimmon.errors import DataError
from persimmon.model import check_boundaries
from persimmon.train import loss

sizes = st.lists(st.integers(1, 40), min_size=1, max_size=12)


def numbered(counts: list[int], first: int = 2) -> list[list[int]]:
    """Documents whose ids are all different, so that a token tells where it came from."""
    documents = []
    for count in counts:
        documents.append(list(range(first, first + count)))
        first += count
    return documents


def packed(counts: list[int], length: int, seed: int = 0) -> tuple[PackedRows, TokenStore]:
    with tempfile.TemporaryDirectory() as directory:
        stores = write_stores(Path(directory), {"text": numbered(counts)})
    return PackedRows(stores, {"text": 1.0}, length, seed), stores["text"]


def same(a: Row, b: Row) -> bool:
    equal_arrays = np.array_equal(a.token_ids, b.token_ids) and np.array_equal(a.targets, b.targets)
    return equal_arrays and (a.boundaries, a.source) == (b.boundaries, b.source)


@settings(max_examples=40)
@given(counts=sizes, length=st.integers(1, 30), seed=st.integers(0, 5), epoch=st.integers(0, 3))
def test_an_epoch_holds_every_token_exactly_once(counts: list[int], length: int, seed: int, epoch: int) -> None:
    rows, store = packed(counts, length, seed)
    begin, end = epoch * store.num_tokens, (epoch + 1) * store.num_tokens
    first, last = begin // length, -(-end // length)
    ids = np.concatenate([rows[row].token_ids for row in range(first, last)])
    targets = np.concatenate([rows[row].targets for row in range(first, last)])
    window = slice(begin - first * length, end - first * length)
    tokens = store.shards[0].tokens
    expected = Counter(zip(tokens[:-1].tolist(), tokens[1:].tolist(), strict=True))
    assert Counter(zip(ids[window].tolist(), targets[window].tolist(), strict=True)) == expected


@settings(max_examples=40)
@given(counts=sizes, length=st.integers(1, 30), seed=st.integers(0, 5))
def test_pieces_are_runs_of_one_document_and_targets_follow(counts: list[int], length: int, seed: int) -> None:
    rows, store = packed(counts, length, seed)
    documents = numbered(counts)
    follows = {a: b for document in documents for a, b in pairwise([*document, END])}
    openings = {document[0] for document in documents}
    for number in range(3 * (-(-store.num_tokens // length))):
        row = rows[number]
        assert row.token_ids.shape == row.targets.shape == (length,)
        assert row.token_ids.dtype == row.targets.dtype == np.int64
        check_boundaries(row.boundaries, 1, length)
        for start, end in pairwise(row.boundaries):
            ids, targets = row.token_ids[start:end].tolist(), row.targets[start:end].tolist()
            assert ids[1:] == targets[:-1]
            assert END not in ids[1:], "a document opens inside a piece"
            for token, target in zip(ids, targets, strict=True):
                assert target in openings if token == END else target == follows[token]


@settings(max_examples=30)
@given(counts=sizes, length=st.integers(1, 30), data=st.data())
def test_any_order_of_access_equals_the_sequence(counts: list[int], length: int, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as directory:
        stores = write_stores(Path(directory), {"text": numbered(counts), "code": numbered([7, 3, 50], 20_000)})
    weights = {"text": data.draw(st.floats(0.1, 10.0)), "code": 1.0}
    sequence = PackedRows(stores, weights, length, seed=3)
    expected = [sequence[row] for row in range(20)]
    # Resuming is access from a later row in a new object; processes take every k-th row.
    order = data.draw(st.permutations(range(20)))
    fresh = PackedRows(stores, weights, length, seed=3)
    assert all(same(fresh[row], expected[row]) for row in order)


@settings(max_examples=40)
@given(
    few=st.lists(st.floats(0.001, 100.0), min_size=1, max_size=3),
    many=st.lists(st.floats(0.01, 1.0), min_size=4, max_size=12),
)
def test_every_prefix_keeps_the_weights(few: list[float], many: list[float]) -> None:
    _, store = packed([1], 1)
    for weights, behind in ((few, 1.0), (many, 1.5)):
        by_name = {f"s{i}": weight for i, weight in enumerate(weights)}
        rows = PackedRows(dict.fromkeys(by_name, store), by_name, 1, 0)
        taken, total = Counter[str](), sum(weights)
        for number in range(200):
            taken[rows[number].source] += 1
            for name, weight in by_name.items():
                lag = (number + 1) * weight / total - taken[name]
                assert -1.0 < lag < behind


def test_three_quarters_text() -> None:
    _, store = packed([30], 10)
    rows = PackedRows({"text": store, "code": store}, {"text": 0.75, "code": 0.25}, 10, 0)
    assert [rows[row].source for row in range(8)] == ["text", "text", "code", "text"] * 2


def test_epochs_and_seeds_shuffle_differently() -> None:
    counts = [3] * 40
    rows, store = packed(counts, store_length := 4 * 40)
    assert store.num_tokens == store_length
    first, second = rows[0].token_ids, rows[1].token_ids
    assert sorted(first) == sorted(second)
    assert not np.array_equal(first, second)
    other, _ = packed(counts, store_length, seed=1)
    assert not np.array_equal(first, other[0].token_ids)


def test_a_document_longer_than_a_row_is_cut_into_whole_rows_of_context() -> None:
    rows, store = packed([95], 32)
    pieces = {tuple(rows._epoch("text", 0).slices(start, start + 32)[0]) for start in (0, 32, 64)}
    assert pieces == {(0, 32), (32, 64), (64, 96)}
    assert store.num_tokens == 96


def test_the_order_of_a_run_is_fixed() -> None:
    """Runs are resumed across versions of this code and of NumPy: these rows must never change."""
    with tempfile.TemporaryDirectory() as directory:
        stores = write_stores(Path(directory), {"text": numbered([5, 9, 2]), "code": numbered([4, 4], 100)})
    rows = PackedRows(stores, {"text": 0.75, "code": 0.25}, 8, seed=0)
    assert [rows[row].token_ids.tolist() for row in range(5)] == [
        [1, 2, 3, 4, 5, 6, 1, 16],
        [17, 14, 15, 1, 7, 8, 9, 10],
        [1, 100, 101, 102, 103, 1, 104, 105],
        [11, 12, 13, 1, 2, 3, 4, 5],
        [6, 1, 16, 17, 14, 15, 1, 7],
    ]


@pytest.mark.parametrize(
    ("weights", "length", "message"),
    [
        ({"code": 1.0}, 8, r"weights \['code'\] must name the sources \['text'\]"),
        ({"text": 0.0}, 8, "weights must be positive"),
        ({"text": float("nan")}, 8, "weights must be positive"),
        ({"text": 1.0}, 0, "row length must be at least 1, got 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    tmp_path: Path, weights: dict[str, float], length: int, message: str
) -> None:
    stores = write_stores(tmp_path, {"text": [[2, 3]]})
    with pytest.raises(DataError, match=message):
        PackedRows(stores, weights, length, 0)


def test_empty_sources_and_negative_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="source 'text' holds no documents"):
        PackedRows(write_stores(tmp_path, {"text": []}), {"text": 1.0}, 8, 0)
    rows, _ = packed([3], 2)
    with pytest.raises(IndexError, match="rows count from 0, got -1"):
        rows[-1]


def two_sources(counts: list[int]) -> dict[str, TokenStore]:
    with tempfile.TemporaryDirectory() as directory:
        return write_stores(Path(directory), {"text": numbered(counts), "code": numbered([7, 3, 50], 20_000)})


@settings(max_examples=40)
@given(counts=sizes, length=st.integers(1, 30), whole=st.booleans(), resumed=st.integers(0, 23))
def test_any_number_of_ranks_sees_the_same_rows_also_after_resuming(
    counts: list[int], length: int, whole: bool, resumed: int
) -> None:
    """Rank r of n takes rows r, r + n, ... of every step, as the training loop does; the state is one number."""
    stores, weights, rows_per_step, steps = two_sources(counts), {"text": 0.75, "code": 0.25}, 8, 3
    run = PackedRows(stores, weights, length, 3, whole=whole)
    expected = [run[row] for row in range(rows_per_step * steps)]
    for size in (1, 2, 4, 8):
        # Every rank has an object of its own, made anew where the run was resumed.
        ranks = [PackedRows(stores, weights, length, 3, whole=whole) for _ in range(size)]
        for step in range(resumed // rows_per_step, steps):
            first = step * rows_per_step
            seen = {
                first + row: ranks[rank][first + row]
                for rank in range(size)
                for row in range(rank, rows_per_step, size)
            }
            assert sorted(seen) == list(range(first, first + rows_per_step))
            assert all(same(row, expected[number]) for number, row in seen.items())


@settings(max_examples=60)
@given(counts=sizes, length=st.integers(1, 30), seed=st.integers(0, 5))
def test_whole_documents_are_cut_only_where_they_must_be(counts: list[int], length: int, seed: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        store = write_stores(Path(directory), {"text": numbered(counts)})["text"]
    rows = PackedRows({"text": store}, {"text": 1.0}, length, seed, whole=True)
    rows[0]
    (epoch,) = rows._packed["text"]
    spans = [span for row in epoch for span in row]
    bounds = store.offsets.astype(int).tolist()
    expected = []
    for begin, end in pairwise(bounds):  # whole rows from the start, the rest at the end
        expected += [(at, min(at + length, end)) for at in range(begin, end, length)]
    assert sorted(spans) == expected
    place = {span: number for number, row in enumerate(epoch) for span in row}
    for begin, end in pairwise(bounds):
        pieces = [place[at, min(at + length, end)] for at in range(begin, end, length)]
        assert pieces == list(range(pieces[0], pieces[0] + len(pieces))), "consecutive rows, in order"
    for number in range(len(epoch)):
        row = rows[number]
        check_boundaries(row.boundaries, 1, length)
        used = sum(b - a for a, b in epoch[number])
        assert (row.targets[:used] != IGNORE).all() and (row.targets[used:] == IGNORE).all()
        assert (row.token_ids[used:] == END).all()


def test_documents_up_to_16k_are_whole_and_longer_ones_in_order(tmp_path: Path) -> None:
    length, counts = 16_384, [16_383, 9_000, 40_000, 7_000, 16_382]
    documents = [[2 + i % 60_000 for i in range(count)] for count in counts]
    store = write_stores(tmp_path, {"text": documents})["text"]
    rows = PackedRows({"text": store}, {"text": 1.0}, length, 0, whole=True)
    rows[0]
    (epoch,) = rows._packed["text"]
    assert {span for row in epoch for span in row} >= {(0, 16_384), (16_384, 25_385)}
    long = [span for row in epoch for span in row if 25_385 <= span[0] < 65_386]
    assert long == [(25_385, 41_769), (41_769, 58_153), (58_153, 65_386)]
    assert len(epoch) == 6  # 9,001 and 7,001 tokens share a row, 7,233 and 16,383 do not


def test_whole_rows_never_change(tmp_path: Path) -> None:
    stores = write_stores(tmp_path, {"text": numbered([5, 9, 2, 1, 3])})
    rows = PackedRows(stores, {"text": 1.0}, 8, seed=0, whole=True)
    assert [rows[row].token_ids.tolist() for row in range(4)] == [
        [1, 2, 3, 4, 5, 6, 1, 18],
        [1, 19, 20, 21, 1, 16, 17, 1],
        [1, 7, 8, 9, 10, 11, 12, 13],
        [14, 15, 1, 1, 1, 1, 1, 1],
    ]
    assert IGNORE == loss.IGNORE
