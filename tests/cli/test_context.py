"""`--context` beyond the model's positions is refused by config.json alone, by every verb that takes it."""

from __future__ import annotations

from pathlib import Path

import pytest

from persimmon.cli.main import main
from tiny_directory import write_tiny_directory


@pytest.fixture(scope="module")
def without_weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of 64 positions whose weights are gone: whoever opens them fails with another message."""
    directory = write_tiny_directory(tmp_path_factory.mktemp("models") / "tiny", max_positions=64)
    for file in directory.glob("*.safetensors"):
        file.unlink()
    return str(directory)


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "MODEL", "--prompt", "a", "--context", "65"],
        ["generate", "MODEL", "--input", "FILE", "--output", "OUT", "--context", "65"],
        ["chat", "MODEL", "--prompt", "a", "--context", "65"],
        ["serve", "MODEL", "--context", "65"],
        ["serve", "MODEL", "--max-model-len", "0"],
        ["eval", "MODEL", "--tasks", "arc_easy", "--context", "65", "--out", "OUT"],
        ["eval", "MODEL", "--tasks", "arc_easy", "--variant", "long:context=65", "--out", "OUT"],
        ["bench", "decode", "MODEL", "--context", "60", "--tokens", "5"],
        ["bench", "prefill", "MODEL", "--lengths", "8,65"],
    ],
    ids=lambda words: "-".join(word for word in words[:2] if word != "MODEL") + words[-1],
)
def test_a_context_beyond_the_model_is_told_before_its_weights_are_opened(
    words: list[str], without_weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n')
    places = {"MODEL": without_weights, "FILE": str(tmp_path / "in.jsonl"), "OUT": str(tmp_path / "out")}
    assert main([places.get(word, word) for word in words]) == 2
    said = capsys.readouterr()
    assert said.out == "" and "64 positions" in said.err
    assert not (tmp_path / "out").exists()


def test_a_context_that_is_no_number_is_refused(
    without_weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", without_weights, "--variant", "a:context=long", "--out", str(tmp_path / "out")]
    assert main(words) == 2
    assert "context must be a whole number, got 'long'" in capsys.readouterr().err
