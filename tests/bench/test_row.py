from __future__ import annotations

import json
from pathlib import Path

import pytest

from persimmon.bench.row import FIELDS, check_row, finished, line, write
from persimmon.errors import InputError


def made_row(**changes: object) -> dict[str, object]:
    """A row as a benchmark hands it in."""
    row = {
        "bench": "decode", "model": "tiny", "engine": "cpu", "format": "p44", "threads": 2, "context": 32,
        "tokens_per_second": 6.5, "runs": [6.4, 6.5, 6.6], "bytes_per_token": 2.8e9, "bytes_per_token_dense": 7.6e9,
        "bandwidth_gb_s": 28.0, "ceiling_tokens_per_second": 10.0, "percent_of_ceiling": 65.0,
        "peak_rss_bytes": 7 << 30,
    }  # fmt: skip
    return row | changes


def test_a_finished_row_says_with_what_and_where() -> None:
    row = finished(made_row())
    assert set(FIELDS) <= set(row)
    assert {"python", "persimmon", "torch", "numpy"} <= set(row["versions"])
    assert {"processor", "threads", "memory_bytes", "load_average"} <= set(row["machine"])
    assert json.loads(line(row)) == row and "\n" not in line(row)


def test_numbers_keep_six_digits_and_whole_ones_all() -> None:
    row = finished(made_row(tokens_per_second=1 / 3, peer={"runs": [2 / 3]}, peak_rss_bytes=123_456_789_012))
    assert row["tokens_per_second"] == 0.333333 and row["peer"]["runs"] == [0.666667]
    assert row["peak_rss_bytes"] == 123_456_789_012


def test_the_own_peak_is_filled_in() -> None:
    row = made_row()
    del row["peak_rss_bytes"]
    assert finished(row)["peak_rss_bytes"] > 10_000_000


@pytest.mark.parametrize("name", FIELDS)
def test_a_missing_field_is_named(name: str) -> None:
    row = finished(made_row())
    del row[name]
    with pytest.raises(InputError, match=f"'{name}'"):
        check_row(row)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threads": "2"}, "threads .* must be int"),
        ({"runs": []}, "one run or more"),
        ({"tokens_per_second": float("nan")}, "must be finite"),
        ({"tokens_per_second": True}, "tokens_per_second"),
        ({"percent_of_ceiling": None}, "percent_of_ceiling"),
    ],
)
def test_wrong_values_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        finished(made_row(**changes))


def test_rows_are_written_whole(tmp_path: Path) -> None:
    row = finished(made_row())
    write(row, tmp_path / "results" / "a.json")
    assert json.loads((tmp_path / "results" / "a.json").read_text()) == row
    assert [file.name for file in (tmp_path / "results").iterdir()] == ["a.json"]
