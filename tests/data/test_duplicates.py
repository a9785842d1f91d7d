"""Duplicates and overlaps: hashes against plain sets of words, MinHash against Jaccard similarity."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from made_corpus import made_text
from persimmon.data.decontaminate import EvaluationIndex
from persimmon.data.duplicates import band_hashes, first_occurrences, join, pairs_of_band
from persimmon.data.ngrams import ngram_hashes, words_of
from persimmon.errors import NotFoundError

SHAPE = {"shingle": 5, "bands": 14, "rows": 8}


def bands(text: str) -> np.ndarray:
    return band_hashes(text, hashlib.sha256(text.encode()).digest(), **SHAPE)


def similar(one: str, other: str) -> bool:
    return bool((bands(one) == bands(other)).any())


@given(words=st.lists(st.sampled_from("abcd"), max_size=30), n=st.integers(1, 6))
def test_equal_runs_have_equal_hashes_and_others_do_not(words: list[str], n: int) -> None:
    hashes = ngram_hashes(words, n)
    runs = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    assert len(hashes) == len(runs)
    assert len(set(hashes.tolist())) == len(set(runs))
    assert dict(zip(runs, hashes.tolist(), strict=True)) == {run: int(ngram_hashes(list(run), n)[0]) for run in runs}


def test_words_ignore_case_layout_and_punctuation() -> None:
    assert words_of("The  cat,\nthe_HAT - ÜBER 42!") == ["the", "cat", "the_hat", "über", "42"]


def test_hashes_never_change() -> None:
    """Work that was begun by one version goes on with the next."""
    assert ngram_hashes(["one", "two", "three"], 3).tolist() == [17228430048120715207]
    assert int(bands("one two three four five six seven")[0]) == 11253082876736843741


def changed(text: str, share: float, seed: int) -> str:
    """`text` with a share of its words replaced."""
    rng, words = random.Random(seed), text.split()
    for place in rng.sample(range(len(words)), round(share * len(words))):
        words[place] = f"other{place}"
    return " ".join(words)


def test_near_copies_are_found_and_different_texts_are_not() -> None:
    rng = random.Random(0)
    texts = [" ".join(rng.choices([f"w{i}" for i in range(2000)], k=400)) for _ in range(40)]
    assert sum(similar(text, changed(text, 0.005, i)) for i, text in enumerate(texts)) == 40
    assert sum(similar(text, changed(text, 0.3, i)) for i, text in enumerate(texts)) == 0
    assert not any(similar(texts[i], texts[j]) for i in range(40) for j in range(i))
    assert similar(texts[0], texts[0].upper().replace(" ", ",\n"))


def test_the_share_of_equal_bands_is_what_the_similarity_says() -> None:
    """One row per band: bands agree with a probability equal to the Jaccard similarity."""
    rng, agreed, expected = random.Random(1), 0.0, 0.0
    for seed in range(30):
        text = " ".join(rng.choices([f"w{i}" for i in range(500)], k=200))
        other = changed(text, 0.06, seed)
        one, two = (set(ngram_hashes(words_of(t), 5).tolist()) for t in (text, other))
        expected += len(one & two) / len(one | two)
        signatures = [band_hashes(t, b"", shingle=5, bands=200, rows=1) for t in (text, other)]
        agreed += float((signatures[0] == signatures[1]).mean())
    assert abs(agreed - expected) / 30 < 0.02


def test_texts_without_a_shingle_equal_themselves_only() -> None:
    assert similar("a b", "a b")
    assert not similar("a b", "a c") and not similar("", "a")


@settings(max_examples=50)
@given(values=st.lists(st.integers(0, 5), max_size=30), other=st.lists(st.integers(0, 5), min_size=30, max_size=30))
def test_groups_are_the_connected_parts(values: list[int], other: list[int]) -> None:
    one, two = np.array(values, dtype=np.uint64), np.array(other[: len(values)], dtype=np.uint64)
    found = join(len(one), [pairs_of_band(one), pairs_of_band(two)])
    group = list(range(len(one)))
    for _ in group:  # slow and plain: spread the smallest number until nothing changes
        for i in range(len(group)):
            for j in range(len(group)):
                if one[i] == one[j] or two[i] == two[j]:
                    group[i] = group[j] = min(group[i], group[j])
    assert found.tolist() == group


def test_first_occurrences() -> None:
    digests = np.array([list(hashlib.sha256(text).digest()) for text in (b"a", b"b", b"a", b"c", b"b")], dtype=np.uint8)
    assert first_occurrences(digests).tolist() == [0, 1, 0, 3, 1]
    assert first_occurrences(digests[:0]).tolist() == []


QUESTION = "Which of these planets has the greatest number of known moons in our own solar system today"


@pytest.fixture
def sets(tmp_path: Path) -> Path:
    (tmp_path / "arc_easy.jsonl").write_text(
        json.dumps({"id": "arc/1", "query": f"Question: {QUESTION}?", "choices": ["Mars", "Saturn"], "gold": 1}) + "\n"
    )
    code = "def add_two_numbers(first_number, second_number):\n    return first_number + second_number  # one two three"
    record = {"task_id": "HumanEval/0", "prompt": "def f():\n", "canonical_solution": code, "test": made_text(5, 9)}
    (tmp_path / "human_eval.jsonl").write_text(json.dumps(record) + "\n")
    return tmp_path


def test_overlaps_are_found_across_case_and_layout(sets: Path) -> None:
    index = EvaluationIndex(sets, 8)
    found = index.overlap("Once upon a time. which OF these\nplanets -- has the greatest number of stars")
    assert found and found.question == "arc/1"
    assert found.words == "which of these planets has the greatest number"
    assert index.overlap("Which of these planets has the least number of known moons") is None
    assert index.overlap(made_text(5, 9)) is None, "a test program is no question"
    solution = index.overlap(
        "return first_number + second_number # one two three "
        "def add_two_numbers(first_number, second_number): return first_number + second_number"
    )
    assert solution is None or solution.question == "HumanEval/0"
    assert index.too_short == 3 and len(index) > 5


@given(start=st.integers(0, 9), before=st.text(), after=st.text())
def test_any_run_of_n_words_in_any_place_is_found(start: int, before: str, after: str) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "x.jsonl").write_text(json.dumps({"question": QUESTION}))
        index = EvaluationIndex(Path(directory), 8)
    words = QUESTION.split()
    assert index.overlap(f"{before} {' '.join(words[start : start + 8])} {after}")
    assert index.overlap(" ".join(words[start : start + 7])) is None


def test_no_sets_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="no evaluation sets"):
        EvaluationIndex(tmp_path, 13)
