"""A made corpus, prepared data and recipes small enough to train in a second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from made_corpus import made_code, made_text


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """text.jsonl and code.jsonl."""
    root = tmp_path_factory.mktemp("corpus")
    texts = {"text": [made_text(i, 5 + 3 * i) for i in range(40)], "code": [made_code(i, 2 + i) for i in range(20)]}
    for name, documents in texts.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in documents))
    return root


@pytest.fixture(scope="session")
def prepared(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data with a vocabulary of 320 pieces."""
    from persimmon.data.prepare import DataRecipe, SourceRecipe, VocabularyRecipe, prepare

    output = tmp_path_factory.mktemp("prepared")
    prepare(
        DataRecipe(
            root=str(corpus),
            output=str(output),
            sources={"text": SourceRecipe(("text.jsonl",), 0.75), "code": SourceRecipe(("code.jsonl",), 0.25)},
            vocabulary=VocabularyRecipe(size=320, characters=50_000),
            held_out=0.1,
        )
    )
    return output


@pytest.fixture
def pretrain_settings(prepared: Path, tmp_path: Path) -> dict[str, Any]:
    """A recipe of 12 steps in two phases; tests change what they need and write it with `write_recipe`."""
    return {
        "data": str(prepared),
        "output": str(tmp_path / "run"),
        "tokens": 12 * 256,
        "threads": 1,
        "model": {"preset": "test", "std": 0.1},
        "phases": [
            {"share": 0.5, "row_length": 64, "batch_tokens": 256},
            {"share": 0.5, "row_length": 128, "batch_tokens": 256},
        ],
        "loop": {"sparsity_penalty": 0.5, "evaluate_every": 0, "micro_tokens": 128},
    }
