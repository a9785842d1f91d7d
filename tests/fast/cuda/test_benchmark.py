"""The measurement's arithmetic, and all of it as a dry run: whoever has a GPU can run it at once."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install 'persimmon[gpu]'")

import triton_interpreter
from persimmon.config import preset
from persimmon.fast.cuda.choice import load_table
from persimmon.fast.cuda.decoder import CudaDecoder
from persimmon.fast.cuda.synthesize import synthesize
from persimmon.infer.decoder import Chunk
from persimmon.infer.params import SamplingParams

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


def test_the_page_has_the_results_tables() -> None:
    root = FOLDER.parents[1]
    page = (root / "docs" / "gpu.md").read_text(encoding="utf-8")
    assert load("page").with_tables(page, FOLDER / "results") == page, "benchmarks/gpu/page.py writes them"
    assert "| torch.compile, static cache, CUDA graph | 1 | 189 | 261 | 1.38 |" in page
    assert "| bfloat16 | bfloat16 | 1 | 32 | 261 |" in page and "345 in `q8`" in (root / "README.md").read_text()


def run(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, str(FOLDER / "run.py"), "--device", "cpu", "--tiny", "--out", str(out), *arguments]
    return subprocess.run(program, capture_output=True, text=True)


INTERPRETED = pytest.mark.skipif(
    triton_interpreter.DEVICE != "cpu",
    reason="the dry run is the interpreter's (and Triton 3.6's fails with NumPy 2.5)",
)


@INTERPRETED
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_dry_run_and_its_continuation(tmp_path: Path) -> None:
    out, table = tmp_path / "gpu.json", tmp_path / "table.json"
    first = run(out, "--sections", "checks,ceilings,mlp", "--formats", "bfloat16,q8,p44", "--table", str(table))
    assert first.returncode == 0, first.stderr[-2000:]
    report = json.loads(out.read_text())
    assert report["device"]["interpreted"] and report["shape"] == "test"
    groups = report["sections"]["checks"]["rows"]
    assert sum(len(group["checks"]) for group in groups) > 40 and all(group["holds"] for group in groups)
    rows = report["sections"]["mlp"]["rows"]
    assert {(row["format"], row["tokens"]) for row in rows} == {
        (name, tokens) for name in ("float32", "q8", "p44") for tokens in (1, 2)
    }
    assert set(load_table(table).mlp["q8"]) == {1, 2}
    second = run(out, "--formats", "bfloat16,q8,p44")
    assert second.returncode == 0, second.stderr[-2000:]
    last = json.loads(second.stdout.splitlines()[-1])
    assert last == json.loads(out.read_text())
    sections = last["sections"]
    assert sections["checks"] == report["sections"]["checks"]  # not measured again
    names = ["checks", "ceilings", "quality", "mlp", "decode", "pairs", "prefill", "memory", "baselines", "ratios"]
    assert sorted(sections) == sorted(names)
    assert all(section["complete"] for section in sections.values())
    for row in sections["decode"]["rows"]:
        assert row["bytes_per_step"] <= row["bytes_per_step_dense"] and row["tokens_per_second"] > 0
        assert row["sparse_mlp"] == (row["active_union"] is not None)
    assert [row["holds"] for row in sections["quality"]["rows"] + sections["pairs"]["rows"]] == [True] * 7
    ratios = sections["ratios"]["rows"]
    assert {row["format"] for row in ratios if row["what"].startswith("long")} == {"float32", "q8", "p44"}
    assert all(0 < row["percent_by_bytes"] <= 100 for row in ratios if "percent_by_bytes" in row)
    assert [row["reference"] for row in ratios if row["what"] == "batch 2"] == [None] * 3
    assert {row["format"] for row in sections["prefill"]["rows"]} == {"float32", "q8", "p44"}
    assert [row["what"] for row in sections["baselines"]["rows"]][-1] == "transformers generate"


@INTERPRETED
@pytest.mark.slow
def test_a_part_of_the_sizes(tmp_path: Path) -> None:
    out = tmp_path / "part.json"
    sizes = ["--layers", "1", "--batches", "2", "--contexts", "48", "--repeats", "1"]
    result = run(out, *sizes, "--formats", "bfloat16", "--sections", "decode")
    assert result.returncode == 0, result.stderr[-2000:]
    report = json.loads(out.read_text())
    assert report["layers"] == 1
    assert [(row["batch"], row["room"]) for row in report["sections"]["decode"]["rows"]] == [(2, 48)]


def test_without_time_nothing_is_claimed(tmp_path: Path) -> None:
    out, table = tmp_path / "gpu.json", tmp_path / "table.json"
    result = run(out, "--budget", "0", "--table", str(table))
    assert result.returncode == 0, result.stderr[-2000:]
    sections = json.loads(result.stdout)["sections"]
    notes = {
        (entry["complete"], len(entry["rows"]), entry.get("note")) for n, entry in sections.items() if n != "ratios"
    }
    assert notes == {(False, 0, "not measured: the time was up")} and sections["ratios"]["rows"] == []
    assert not table.exists(), "nothing was measured that it could hold"
    other = run(out, "--active", "0.2", "--budget", "0")
    assert other.returncode == 1 and "another shape, device or version" in other.stderr
    unknown = run(tmp_path / "other.json", "--sections", "decoding")
    assert unknown.returncode == 1 and "unknown section 'decoding'" in unknown.stderr


class Budget:
    """A bench that is out of time after some cases."""

    def __init__(self, cases: int) -> None:
        self.cases, self.report, self.saved = cases, {"sections": {}}, 0

    def check_time(self, seconds: float) -> None:
        self.cases -= 1
        if self.cases < 0 or seconds > 60:
            raise sys.modules["cases"].OutOfTime

    def save(self) -> None:
        self.saved += 1

    def release(self) -> None:
        """Nothing is held."""


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The driver, with the modules beside it."""
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    yield load("run")
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and Path(str(sys.modules[name].__file__)).parent == FOLDER:
            del sys.modules[name]


def test_what_fails_is_kept_as_an_error_and_the_rest_goes_on(program: ModuleType) -> None:
    from cases import Case

    measured: list[int] = []
    broken = {1}

    def section(_: object) -> Iterator[Any]:
        for number in range(4):

            def measure(number: int = number) -> dict[str, int]:
                measured.append(number)
                if number in broken:
                    raise ModuleNotFoundError("No module named 'transformers'")
                return {"square": number * number}

            yield Case({"number": number}, measure)

    bench = Budget(3)
    program.run_section("numbers", section, bench)
    entry = bench.report["sections"]["numbers"]
    assert measured == [0, 1, 2] and not entry["complete"] and entry["note"].startswith("cut short")
    assert entry["rows"] == [
        {"number": 0, "square": 0},
        {"number": 1, "error": "ModuleNotFoundError: No module named 'transformers'"},
        {"number": 2, "square": 4},
    ]
    assert list(program.failures(bench.report)) == [
        "failed: numbers: number 1, error ModuleNotFoundError: No module named 'transformers'"
    ]
    broken.clear()
    bench.cases = 9
    program.run_section("numbers", section, bench)  # takes up what is missing and what failed, nothing else
    assert measured == [0, 1, 2, 1, 3] and entry["complete"] and "note" not in entry
    assert list(program.failures(bench.report)) == []
    bench.report["sections"]["numbers"]["rows"].append({"number": 9, "holds": False})
    assert list(program.failures(bench.report)) == ["does not hold: numbers: number 9, holds False"]


def test_a_section_brings_what_it_reads(program: ModuleType) -> None:
    import sections

    known = list(sections.SECTIONS)
    assert program.chosen("prefill", known, sections.NEEDS) == ["ceilings", "prefill"]
    assert program.chosen("ratios", known, sections.NEEDS) == ["ceilings", "decode", "ratios"]
    assert program.chosen("", known, sections.NEEDS) == known


def test_slow_starters_are_not_begun_late(program: ModuleType) -> None:
    from cases import Case

    bench = Budget(9)
    program.run_section("late", lambda _: iter([Case({}, lambda: pytest.fail("was begun"), 90.0)]), bench)
    assert bench.report["sections"]["late"]["note"] == "not measured: the time was up"


def test_ids_may_differ_in_ties_only(program: ModuleType) -> None:
    import quality

    logits = torch.tensor([[8.0, 7.95, 0.0], [8.0, 7.9, 0.0]])
    assert quality.tie_rule(logits, torch.tensor([0, 0])) == {
        "ids": 2, "other_ids": 0, "largest_gap": 0.0, "tie_bound": 0.0625, "holds": True,
    }  # fmt: skip
    assert quality.tie_rule(logits, torch.tensor([1, 0]))["holds"]
    other = quality.tie_rule(logits, torch.tensor([0, 1]))
    assert (other["other_ids"], other["holds"]) == (1, False)


def test_bfloat16_draws_the_references_ids_but_for_ties(program: ModuleType) -> None:
    """64 greedy ids on the device, each held to the float32 reference after the same ids."""
    import quality

    loaded = synthesize(preset("test", max_positions=128), "bfloat16", torch.device(triton_interpreter.DEVICE), 0.2)
    decoder = CudaDecoder(loaded, cache_tokens=128)
    sequence = decoder.new_sequence(72)
    prompt = [3, 99, 41, 7]
    decoder.forward([Chunk(sequence, prompt[:-1], "none")])
    drawn = decoder.decode([sequence], prompt[-1:], [SamplingParams(temperature=0.0)], 64).token_ids[0].tolist()
    with torch.inference_mode():
        logits = quality.reference(loaded)(torch.tensor([prompt + drawn[:-1]], device=loaded.device))[0, 3:]
    found = quality.tie_rule(logits, torch.tensor(drawn, device=loaded.device))
    assert found["ids"] == 64 and found["holds"], found
