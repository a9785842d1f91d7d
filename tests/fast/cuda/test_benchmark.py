"""The measurement's arithmetic, and all of it as a dry run: whoever has a GPU can run it at once."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install 'persimmon[gpu]'")

from persimmon.config import preset
from persimmon.fast.cuda.choice import load_table

FOLDER = Path(__file__).parents[3] / "benchmarks" / "gpu"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"gpu_benchmark_{name}", FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_ceilings_follow_from_bytes() -> None:
    """The published case: 16.65 GB per token in bfloat16 on an H200's 4.8 TB/s."""
    arithmetic = load("arithmetic")
    step = arithmetic.StepBytes(16_646_000_000, 0, 0)
    assert round(arithmetic.ceiling_tokens_per_second(step, 1, 4.8e12)) == 288
    assert arithmetic.ceiling_tokens_per_second(step, 4, 4.8e12) == 4 * arithmetic.ceiling_tokens_per_second(
        step, 1, 4.8e12
    )
    skipping = arithmetic.StepBytes(100, 30, 50)
    assert (skipping.total, skipping.dense) == (120, 150)
    assert arithmetic.percent(216, 288) == 75.0 and arithmetic.percent(1, 0) == 0.0


def test_unions_of_independent_tokens() -> None:
    union = load("arithmetic").union_of_active
    assert union(0.1, 1) == pytest.approx(0.1) and union(0.1, 8) == pytest.approx(0.5695, abs=1e-4)
    assert union(0.0, 8) == 0.0 and union(1.0, 3) == 1.0


def test_operations_of_a_prompt() -> None:
    """Two per parameter and token, but for the head, of which one position is wanted; causal attention on top."""
    config = preset("8b")
    flops = load("arithmetic").prefill_flops(config, 1)
    assert flops == 2 * (7_249_683_456 + 8_192) + 4 * 4096 * 36 + 2 * 262_144 * 4096
    twice, once = (load("arithmetic").prefill_flops(config, n) for n in (16_384, 8_192))
    assert twice - 2 * once == pytest.approx(4 * 8_192**2 * 4096 * 36, rel=0.01)


def run(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, str(FOLDER / "run.py"), "--device", "cpu", "--tiny", "--out", str(out), *arguments]
    return subprocess.run(program, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_dry_run_and_its_continuation(tmp_path: Path) -> None:
    out, table = tmp_path / "gpu.json", tmp_path / "table.json"
    first = run(out, "--sections", "checks,ceilings,mlp", "--formats", "bfloat16,q8,p44", "--table", str(table))
    assert first.returncode == 0, first.stderr[-2000:]
    report = json.loads(out.read_text())
    assert report["device"]["interpreted"] and report["shape"] == "test"
    checks = report["sections"]["checks"]["rows"]
    assert len(checks) > 40 and all(check["holds"] for check in checks.values())
    assert set(report["sections"]["mlp"]["rows"]) == {"float32", "q8", "p44"}
    assert set(load_table(table).mlp["q8"]) == {1, 2}
    second = run(out, "--formats", "bfloat16,q8,p44")
    assert second.returncode == 0, second.stderr[-2000:]
    last = json.loads(second.stdout.splitlines()[-1])
    assert last == json.loads(out.read_text())
    sections = last["sections"]
    assert sections["checks"] == report["sections"]["checks"]  # not measured again
    assert list(sections) == ["checks", "ceilings", "mlp", "decode", "prefill", "memory", "baselines"]
    assert all(section["complete"] for section in sections.values())
    for row in sections["decode"]["rows"]:
        assert row["bytes_per_step"] <= row["bytes_per_step_dense"] and row["tokens_per_second"] > 0
    assert {row["format"] for row in sections["prefill"]["rows"]} == {"float32", "q8", "p44"}
    assert [row["what"] for row in sections["baselines"]["rows"]][-1] == "transformers generate"


def test_without_time_nothing_is_claimed(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    result = run(out, "--budget", "0", "--sections", "ceilings,decode")
    assert result.returncode == 0, result.stderr[-2000:]
    sections = json.loads(out.read_text())["sections"]
    notes = {name: (entry["complete"], entry["rows"], entry["note"]) for name, entry in sections.items()}
    assert notes == dict.fromkeys(("ceilings", "decode"), (False, [], "not measured: the time was up"))
    other = run(out, "--active", "0.2", "--budget", "0")
    assert other.returncode == 1 and "another shape, device or version" in other.stderr
