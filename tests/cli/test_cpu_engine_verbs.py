"""`persimmon quantize | synthesize | sparsity`, through the front that users call."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import persimmon
from persimmon.cli.main import main
from persimmon.fast.cpu.native_module import why_unavailable
from persimmon.fast.cpu.packed import is_packed
from tiny_directory import write_tiny_directory

needs_the_engine = pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))

TEXT = "the story of a light. the human of the story: a light.\n" * 20


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_directory(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "story.txt"
    file.write_text(TEXT)
    return file


def run(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_model_exported_over_a_quantized_one_takes_its_place(
    capsys: pytest.CaptureFixture[str], directory: Path, tmp_path: Path
) -> None:
    assert run(capsys, "quantize", directory, tmp_path / "out", "--format", "q8", "--quiet")[0] == 0
    code, said, _ = run(capsys, "info", tmp_path / "out", "--json")
    assert code == 0 and json.loads(said)["weights"]["dtype"] == "q8"
    code, _, err = run(capsys, "export", tmp_path / "out", tmp_path / "again")
    assert code == 2 and "is quantized; use the model that it was made from" in err
    assert run(capsys, "export", directory, tmp_path / "out", "--force", "--quiet")[0] == 0
    assert not is_packed(tmp_path / "out") and not list((tmp_path / "out").glob("packed-*"))


# -- quantize ------------------------------------------------------------------------------------------------


@needs_the_engine
@pytest.mark.parametrize("form", ["q8", "p44"])
def test_a_quantized_model_runs_and_is_measured(
    form: str, directory: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "packed"
    code, said, _ = run(capsys, "quantize", directory, out, "--format", form, "--report", text, "--json")
    document = json.loads(said)
    assert code == 0 and document["format"] == form and document["directory"] == str(out)
    assert document["weight_bytes"] == sum(file.stat().st_size for file in out.glob("*.safetensors"))
    report = document["report"]
    assert report["tokens"] > 200 and report["source_perplexity"] > 1
    assert report["perplexity"] / report["source_perplexity"] - 1 == report["perplexity_change"]
    if form == "q8":
        assert 0 <= report["kl"] < 0.05 and report["top1_agreement"] > 0.9
    model = persimmon.load(out)
    assert model.engine_name == "cpu"
    assert len(model.generate("the", max_tokens=4, temperature=0.0, logit_bias={1: -100.0}).token_ids) == 4


@needs_the_engine
def test_the_page_names_size_and_cost(
    directory: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said, err = run(capsys, "quantize", directory, tmp_path / "q4", "--format", "q4", "--report", text)
    assert code == 0 and err == ""
    for words in ("quantized to", "q4", "bits each", "perplexity", "nats per token", "same top token"):
        assert words in said


@needs_the_engine
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--format", "q3"], "q8, q4, p44"),
        (["--threads", "0"], "threads must be from 1 to 1024"),
        (["--report", "nowhere.txt"], "no text at nowhere.txt"),
    ],
)
def test_bad_requests_write_nothing(
    words: list[str], message: str, directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said, err = run(capsys, "quantize", directory, tmp_path / "out", *words)
    assert code == 2 and message in err and not said
    assert not list(tmp_path.iterdir())


# -- synthesize ----------------------------------------------------------------------------------------------


@needs_the_engine
def test_a_synthetic_model_is_reproducible(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--preset", "test", "--layers", "1", "--active", "0.2", "--format", "p44"]
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        code, said, err = run(capsys, "synthesize", tmp_path / name, *options, "--seed", seed, "--json")
        document = json.loads(said)
        assert code == 0 and document["active"] == 0.2 and "not for text" in err
    contents = {name: [file.read_bytes() for file in sorted((tmp_path / name).glob("*.safetensors"))] for name in "abc"}
    assert len(contents["a"]) == 3 and contents["a"] == contents["b"] != contents["c"]


@needs_the_engine
@pytest.mark.parametrize("words", [["--active", "1.5"], ["--preset", "900b"], ["--layers", "0"]])
def test_impossible_synthetic_models(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(
        capsys, "synthesize", tmp_path / "out", *(words if "--preset" in words else ["--preset", "test", *words])
    )
    assert code == 2 and err.startswith("persimmon: error: ")
    assert not list(tmp_path.iterdir())


# -- sparsity ------------------------------------------------------------------------------------------------


def test_zeros_as_json_and_as_a_picture(
    directory: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "zeros.png"
    words = ["--plot", picture] if _has_matplotlib() else []
    code, said, _ = run(capsys, "sparsity", directory, "--text", text, "--max-tokens", "100", "--json", *words)
    document = json.loads(said)
    assert code == 0 and document["tokens"] == 100 and len(document["layers"]) == 2
    assert all(0 < layer["zeros"] < 1 and 0 < layer["overlap"] < 1 for layer in document["layers"])
    saved = document["mlp_bytes_per_token"]["bfloat16"]
    assert saved["skipped"] == pytest.approx(saved["dense"] * document["zeros"] / 2, abs=1)
    assert not words or picture.read_bytes().startswith(b"\x89PNG")


def _has_matplotlib() -> bool:
    import importlib.util

    return importlib.util.find_spec("matplotlib") is not None


def test_the_table_of_zeros(directory: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said, err = run(capsys, "sparsity", directory, "--text", text, "--max-tokens", "60")
    assert code == 0 and err == ""
    for words in ("zeros after the squared ReLU, over 60 tokens", "overlap", "p44: ", "need not be read"):
        assert words in said


def test_zeros_need_a_text(directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "sparsity", directory, "--text", tmp_path / "none.txt")
    assert code == 2 and "no text at" in err
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    code, _, err = run(capsys, "sparsity", directory, "--text", tmp_path / "binary")
    assert code == 2 and "not a UTF-8 text" in err
