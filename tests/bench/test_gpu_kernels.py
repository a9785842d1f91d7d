"""The choice between dense and sparse on a GPU, measured in the interpreter: out comes a table the engine takes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import triton_interpreter  # isort: skip - before triton
import torch

from persimmon.bench import gpu_kernels
from persimmon.bench.gpu_kernels import Setting, gpu_kernels_row
from persimmon.cli.main import main
from persimmon.config import preset
from persimmon.engines import ENGINES, Choice
from persimmon.errors import InputError
from persimmon.fast.cuda.choice import load_table, table_for

DEVICE = torch.device(triton_interpreter.DEVICE)


def setting(**changes: Any) -> Setting:
    options: dict[str, Any] = {"formats": ["float32", "q8", "p44"], "tokens": [1, 2], "active": 0.2, "runs": 1}
    return Setting(preset("test"), DEVICE, layer_bytes=1, **options | changes)


def test_every_format_and_number_of_tokens_is_measured(tmp_path: Path) -> None:
    row, table = gpu_kernels_row(setting())
    assert row["bench"] == "kernels" and row["engine"] == "cuda" and row["gpu"] == table.gpu
    names = [entry["kernel"] for entry in row["kernels"]]
    for name in ("float32", "q8", "p44"):
        for kind in ("dense", "sparse"):
            assert [n for n in names if n.startswith(f"MLP, {name}, {kind}")] == [
                f"MLP, {name}, {kind}, {count} tokens" for count in (1, 2)
            ]
        assert set(table.mlp[name]) == {1, 2}
        chosen = row["chosen"][name]
        assert chosen == {str(n): "sparse" if table.sparse(name, n) else "dense" for n in (1, 2)}
    shares = {entry["kernel"]: entry["active_share"] for entry in row["kernels"]}
    assert 0 < shares["MLP, q8, sparse, 1 tokens"] <= shares["MLP, q8, sparse, 2 tokens"] < 0.8
    table.save(tmp_path / "table.json")
    assert load_table(tmp_path / "table.json") == table
    found, why = table_for(table.gpu, tmp_path / "table.json")
    assert found == table and "20% active" in why


def test_what_wins_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """With made times: dense wins for one token, sparse for two, and by too little for four."""
    times = iter([10e-6, 11e-6, 10e-6, 5e-6, 10e-6, 9.9e-6])
    monkeypatch.setattr(gpu_kernels, "copy_bandwidth", lambda setting: 100.0)
    monkeypatch.setattr(gpu_kernels, "median_seconds", lambda run, setting: next(times))
    row, _ = gpu_kernels_row(setting(formats=["q8"], tokens=[1, 2, 4]))
    assert row["chosen"] == {"q8": {"1": "dense", "2": "sparse", "4": "dense"}}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"formats": ["q4"]}, "q4"),
        ({"formats": ["q3"]}, "q3"),
        ({"tokens": [9]}, "up to 8"),
        ({"active": 1.0}, "share"),
    ],
)
def test_what_cannot_be_measured_is_named(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        gpu_kernels_row(setting(**changes))


def test_the_verb_writes_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "kernels", "--device", "mps"]) == 2
    if DEVICE.type == "cpu":
        assert main(["bench", "kernels", "--device", "cuda", "--table", str(tmp_path / "none.json")]) == 1
        assert "is not available" in capsys.readouterr().err and not list(tmp_path.iterdir())
    monkeypatch.setattr("persimmon.engines.choose_device", lambda requested: Choice(str(DEVICE), "test"))
    monkeypatch.setattr(type(ENGINES["cuda"]), "why_not", lambda engine, config=None: None)
    words = ["--preset", "test", "--formats", "float32,q8", "--batches", "1", "--runs", "1", "--layer-bytes", "1"]
    table = tmp_path / "cache" / "table.json"
    assert main(["bench", "kernels", "--device", "cuda", *words, "--table", str(table)]) == 0
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(load_table(table).mlp) == set(row["chosen"]) == {"float32", "q8"}
