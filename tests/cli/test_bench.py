"""`persimmon bench`, through the front that users call, on tiny models; no time is asserted."""

from __future__ import annotations

import importlib.util
import json
import shlex
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest

from persimmon.bench import ceiling
from persimmon.bench.limits import Limit
from persimmon.bench.row import FIELDS
from persimmon.bench.subject import Subject, load_subject
from persimmon.cli.main import main
from persimmon.config import preset
from persimmon.fast.cpu.native_module import why_unavailable
from persimmon.fast.cpu.synthesize import synthesize
from tiny_directory import write_tiny_directory

needs_the_engine = pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))

SMALL = ["--bandwidth-bytes", "1048576", "--threads", "1", "--runs", "2"]


@pytest.fixture(autouse=True)
def known_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that reads 10 GB/s and multiplies at 100 GFLOP/s; tests/bench/test_limits.py measures this one."""
    found = {"read": Limit(10.0, "sum", (10.0,), {}), "gemm": Limit(100.0, "float32", (100.0,), {"bfloat16": 50.0})}
    monkeypatch.setattr(ceiling, "measure", lambda kind, *_: found[kind])


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_directory(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model without a tokenizer, as benchmarks use them."""
    if (reason := why_unavailable()) is not None:
        pytest.skip(reason)
    path = tmp_path_factory.mktemp("models") / "random-p44"
    synthesize(preset("test"), path, "p44", active=0.2, threads=1)
    return path


def run(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int, list[str], str]:
    code = main(["bench", *(str(word) for word in words)])
    captured = capsys.readouterr()
    return code, captured.out.splitlines(), captured.err


def row_of(lines: list[str]) -> dict[str, Any]:
    """The last line, checked to hold what every row holds."""
    row: dict[str, Any] = json.loads(lines[-1])
    assert set(FIELDS) <= set(row)
    return row


def peer(rate: str = "2.0") -> str:
    """A command that claims to have been so fast."""
    program = f"print('{{{{\"tokens_per_second\": {rate}}}}}')".replace("{{", "{").replace("}}", "}")
    return f"{shlex.quote(sys.executable)} -c {shlex.quote(program)}"


# -- decode and prefill --------------------------------------------------------------------------------------


def test_decoding_prints_the_ceiling_first_and_the_row_last(
    packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "decode",
        packed,
        *SMALL,
        "--context",
        "5",
        "--tokens",
        "3",
        "--batch",
        "2",
        "--out",
        tmp_path / "row.json",
    ]
    code, lines, err = run(capsys, *words)
    row = row_of(lines)
    assert code == 0 and err == ""
    assert lines[0] == "ceiling: 10.0 GB/s read by 1 threads (sum)" and lines[1].startswith("achieved: ")
    assert (row["bench"], row["model"], row["engine"], row["format"]) == ("decode", "random-p44", "cpu", "p44")
    assert (row["context"], row["tokens"], row["batch"], row["threads"]) == (5, 3, 2, 1)
    assert len(row["runs"]) == 2 and row["runs"][0] > 0
    assert 0 < row["active_share"] <= row["candidate_share"] <= 1
    assert row["bytes_per_token"] <= row["bytes_per_token_dense"]
    assert row["ceiling_tokens_per_second"] == pytest.approx(10e9 / row["bytes_per_token"], rel=1e-4)
    assert row["percent_of_ceiling"] == pytest.approx(
        100 * row["tokens_per_second"] / row["ceiling_tokens_per_second"], rel=1e-4
    )
    assert json.loads((tmp_path / "row.json").read_text()) == row


def test_a_peer_runs_in_turns_and_json_stands_alone(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, lines, err = run(
        capsys, "decode", packed, *SMALL, "--tokens", "2", "--against", peer(), "--json", "--startup"
    )
    row = row_of(lines)
    assert code == 0 and len(lines) == 1 and "ceiling: " in err
    assert row["ratios"] == pytest.approx([rate / 2.0 for rate in row["runs"]], rel=1e-4)
    assert row["ratio_min"] <= row["ratio"] <= row["ratio_max"]
    assert row["peer"]["tokens_per_second"] == 2.0 and row["peer"]["runs"] == [2.0, 2.0]
    assert row["startup_seconds"] > 0 and len(row["startup_runs"]) == 3


def test_a_cache_can_be_filled_by_copies(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["decode", directory, *SMALL, "--engine", "reference", "--context", "150", "--tokens", "2"]
    code, lines, _ = run(capsys, *words, "--fill", "copy")
    row = row_of(lines)
    assert code == 0 and (row["fill"], row["engine"], row["context"]) == ("copy", "reference", 150)
    assert row["bytes_per_token"] == row["bytes_per_token_dense"]


def test_weight_files_are_read_back(packed: Path) -> None:
    assert load_subject(str(packed), {"threads": 1, "weights": "resident"}).page_in() == 0
    subject = load_subject(str(packed), {"threads": 1, "weights": "mapped"})
    assert subject.page_in() == sum(file.stat().st_size for file in packed.glob("*.safetensors"))


def test_prefill_has_every_length(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, lines, _ = run(capsys, "prefill", directory, *SMALL, "--lengths", "8,16", "--against", peer("{length}"))
    row = row_of(lines)
    assert code == 0 and row["bench"] == "prefill"
    assert [entry["context"] for entry in row["lengths"]] == [8, 16] and row["context"] == 16
    assert [entry["peer"]["tokens_per_second"] for entry in row["lengths"]] == [8.0, 16.0]
    assert row["flops"] > row["lengths"][0]["flops"] and "float32" in row["gemm_gflops"]


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_a_row_is_drawn(directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, _ = run(capsys, "prefill", directory, *SMALL, "--lengths", "8", "--plot", tmp_path / "a.png")
    assert code == 0 and (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


# -- kernels, train, serve -----------------------------------------------------------------------------------


@needs_the_engine
def test_kernels_are_measured_in_every_format(capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "kernels",
        "--preset",
        "test",
        *SMALL,
        "--layer-bytes",
        "1",
        "--depth",
        "24",
        "--formats",
        "q8,q4,p44,bfloat16",
    ]
    code, lines, _ = run(capsys, *words)
    row = row_of(lines)
    names = [entry["kernel"] for entry in row["kernels"]]
    assert code == 0 and row["bench"] == "kernels"
    for part in ("attention projections, q8", "attention projections, q4", "vocabulary head, two passes"):
        assert names.count(part) == 1
    for form in ("q4", "p44"):
        shares = [entry["active_share"] for entry in row["kernels"] if entry["kernel"] == f"MLP, {form}"]
        assert len(shares) == 8 and shares == sorted(shares) and shares[0] < 0.2 and shares[-1] > 0.8
    assert set(row["break_even"]) >= {"dense", "q8", "p44", "bfloat16"}


def test_a_training_step(capsys: pytest.CaptureFixture[str]) -> None:
    shape = ["--hidden", "32", "--layers", "1", "--mlp", "64", "--heads", "2", "--vocab", "64"]
    words = ["train", *shape, *SMALL, "--context", "16", "--batch", "2", "--documents", "5", "--against", peer("10.0")]
    code, lines, _ = run(capsys, *words)
    row = row_of(lines)
    assert code == 0 and (row["bench"], row["batch"], row["documents"]) == ("train", 2, 5)
    assert row["ratios"] == pytest.approx([rate / 10.0 for rate in row["runs"]], rel=1e-4)
    assert row["peak_rss_ratio"] == pytest.approx(row["peak_rss_bytes"] / row["peer"]["peak_rss_bytes"], rel=1e-4)


@pytest.mark.slow
def test_a_server_of_its_own_is_measured(directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["serve", directory, *SMALL, "--clients", "1,3", "--seconds", "1", "--tokens", "4", "--disconnects", "0.3"]
    code, lines, _ = run(capsys, *words)
    row = row_of(lines)
    assert code == 0 and row["clients"] == [1, 3] and [level["errors"] for level in row["levels"]] == [0, 0]
    assert row["cache_share_held_at_rest"] == 0.0
    assert row["peak_rss_bytes"] == max(row["server_rss_bytes"]) > 50_000_000


# -- peers on the same weights -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
@pytest.mark.parametrize(
    "words",
    [
        ["decode", "--context", "4", "--tokens", "3", "--batch", "2"],
        ["prefill", "--lengths", "8"],
        ["serve", "--clients", "2", "--seconds", "1", "--tokens", "4"],
    ],
    ids=lambda words: words[0],
)
def test_transformers_runs_beside_us(words: list[str], directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, lines, _ = run(capsys, words[0], directory, *words[1:], *SMALL, "--against", "transformers")
    row = row_of(lines)
    assert code == 0 and row["peer"]["name"] == "transformers" and row["ratio"] > 0
    if words[0] != "serve":
        assert row["peer"]["weights"] == "the same" and "transformers" in row["peer"]["versions"]
        assert row["peer"]["peak_rss_bytes"] > 50_000_000


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
def test_transformers_trains_the_same_shape_and_runs_random_weights(
    packed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = ["--hidden", "32", "--layers", "1", "--mlp", "64", "--heads", "2", "--vocab", "64"]
    code, lines, _ = run(
        capsys, "train", *shape, *SMALL, "--context", "16", "--batch", "2", "--against", "transformers"
    )
    assert code == 0 and row_of(lines)["peer"]["name"] == "transformers"
    words = ["decode", packed, *SMALL, "--runs", "1", "--tokens", "2", "--against", "transformers", "--peer-restart"]
    code, lines, _ = run(capsys, *words, "--weights", "mapped")
    assert code == 0 and row_of(lines)["peer"]["weights"] == "random" and row_of(lines)["weights"] == "mapped"


def test_beside_a_peer_that_fills_the_memory_resident_weights_are_loaded_for_each_run(
    packed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of the model is left while the peer runs."""
    alive: list[weakref.ref[Subject]] = []
    before: list[int] = []

    def load(*given: Any) -> Subject:
        before.append(sum(model() is not None for model in alive))
        subject = load_subject(*given)
        alive.append(weakref.ref(subject))
        return subject

    monkeypatch.setattr("persimmon.bench.subject.load_subject", load)
    peer = shlex.join([sys.executable, "-c", "print('{\"tokens_per_second\": 5.0}')"])
    words = ["decode", packed, *SMALL, "--runs", "2", "--tokens", "2", "--weights", "resident", "--against", peer]
    code, lines, _ = run(capsys, *words, "--peer-restart")
    row = row_of(lines)
    assert code == 0 and row["weights"] == "resident" and len(row["runs"]) == 2 and row["bytes_per_token"] > 0
    assert before == [0, 0, 0], "one for the row's facts and one a run, each alone"


# -- bad requests --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["decode", "--runs", "0"], "--runs must be 1 or more, got 0"),
        (["decode", "--tokens", "0"], "--tokens must be 1 or more"),
        (["decode", "--batch", "-1"], "--batch must be 1 or more"),
        (["decode", "--context", "0"], "--context must be 1 or more"),
        (["decode", "--bandwidth-bytes", "0"], "--bandwidth-bytes must be 1 or more"),
        (["decode", "--fill", "guess"], "--fill"),
        (["prefill", "--lengths", "8,x"], "--lengths is a comma-separated list"),
        (["prefill", "--lengths", "0"], "--lengths is a comma-separated list"),
        (["kernels", "--formats", "q3"], "'q3'"),
        (["kernels", "--preset", "900b"], "900b"),
        (["train", "--dtype", "float16"], "--dtype must be float32 or bfloat16"),
        (["train", "--context", "20000"], "--context must be at most 16384"),
        (["train", "--hidden", "30", "--heads", "8"], "num_heads"),
        (["train", "--documents", "5000"], "--documents must be from 0"),
        (["serve", "--clients", "1,,2"], "--clients is a comma-separated list"),
        (["serve", "--pid", "1"], "--pid belongs to --url"),
        (["serve", "--against", "llama-bench"], "must be transformers"),
        (["report", "nowhere"], "no benchmark rows at nowhere"),
        (["juggle"], "juggle"),
        ([], "decode|prefill"),
    ],
)
def test_bad_requests_name_what_is_wrong(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, lines, err = run(capsys, *words)
    assert code == 2 and message in err and not lines


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--context", "16384"], 2, "exceed the model's 16384 positions"),
        (["--against", "no-such-program-here"], 1, "cannot be started"),
        (["--against", "transformers", "--peer-dtype", "float16"], 2, "--peer-dtype must be"),
        (["--fill", "copy", "--engine", "reference", "--against", ""], 0, ""),
    ],
)
def test_requests_that_do_not_fit_the_model(
    words: list[str], code: int, message: str, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found, _, err = run(capsys, "decode", directory, *SMALL, "--tokens", "2", *words)
    assert found == code and message in err


def test_reports_print_write_and_fill_pages(
    tmp_path: Path, directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from persimmon.bench import report

    row, page = tmp_path / "rows" / "a.json", tmp_path / "page.md"
    run(capsys, "prefill", directory, *SMALL, "--lengths", "8", "--out", row)
    page.write_text(f"{report.BEGIN}\n{report.END}\n")
    code, lines, _ = run(capsys, "report", row.parent, "--out", tmp_path / "t.md", "--page", page)
    assert code == 0 and lines[0].startswith("| row | model |") and lines[2].startswith("| a | tiny |")
    assert (tmp_path / "t.md").read_text().splitlines() == lines == page.read_text().splitlines()[1:-1]
    code, lines, _ = run(capsys, "report", row, "--json")
    assert code == 0 and set(json.loads("\n".join(lines))) == {"a"}
