"""The table that decides between dense and sparse: measured here, or dense."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from persimmon.errors import InputError
from persimmon.fast.cuda.choice import DENSE, MEASURED, SPARSE, KernelTable, MlpTimes, load_table, table_for

TABLE = KernelTable(
    "GPU A", 0.1, {"bfloat16": {1: MlpTimes(40.0, 30.0), 4: MlpTimes(41.0, 40.5), 8: MlpTimes(42.0, 20.0)}}
)


def test_sparse_has_to_win() -> None:
    """One token: won. Two to four: the measurement at four decides, and 1 % is noise. Nine: not measured."""
    assert [TABLE.sparse("bfloat16", n) for n in (1, 2, 4, 5, 8, 9)] == [True, False, False, True, True, False]
    assert not TABLE.sparse("q8", 1) and not DENSE.sparse("bfloat16", 1) and SPARSE.sparse("p44", 8)


def test_tables_are_kept_and_belong_to_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "cache" / "persimmon" / "gpu_kernels.json"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("PERSIMMON_KERNEL_TABLE", raising=False)
    table, why = table_for("GPU A")
    assert table == DENSE and "no kernel table was measured" in why
    TABLE.save(file)
    assert load_table(file) == TABLE
    assert table_for("GPU A")[0] == TABLE
    table, why = table_for("GPU B")
    assert table == DENSE and "measured on 'GPU A'" in why
    with pytest.raises(InputError, match="measured on 'GPU A', this is 'GPU B'"):
        table_for("GPU B", file)
    monkeypatch.setenv("PERSIMMON_KERNEL_TABLE", str(file))
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert table_for("GPU A")[0] == TABLE


def test_tables_that_come_along_are_those_of_the_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERSIMMON_KERNEL_TABLE", str(tmp_path / "none.json"))
    results = Path(__file__).parents[3] / "benchmarks" / "gpu" / "results"
    reports = {r["device"]["name"]: r for r in (json.loads(f.read_text()) for f in results.glob("*.json"))}
    for table in MEASURED:
        assert table_for(table.gpu)[0] is table
        rows = reports[table.gpu]["sections"]["mlp"]["rows"]
        for row in rows:
            assert table.mlp[row["format"]][row["tokens"]] == MlpTimes(row["dense_us"], row["sparse_us"])
        assert sum(len(by_tokens) for by_tokens in table.mlp.values()) == len(rows)
    assert table_for("another GPU")[0] is DENSE


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"version": 2}', '{"version": 1, "gpu": "a", "active": 0, "mlp": 3}']
)
def test_broken_tables_are_named(text: str, tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    file.write_text(text)
    with pytest.raises(InputError, match=r"table\.json"):
        load_table(file)
