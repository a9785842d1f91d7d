"""`tokenizer train` from a recipe: the vocabulary of `data prepare`, the mix, the same bytes again, a report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from made_corpus import made_code, made_text
from persimmon.cli.main import main
from persimmon.data.learn import compression, train_from_recipe
from persimmon.data.prepare import prepare
from persimmon.data.recipe import DataRecipe
from persimmon.errors import InputError
from persimmon.tokenizer import Tokenizer
from persimmon.train.recipe import from_mapping, load_recipe


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("root")
    for name, make in (("text", made_text), ("code", made_code)):
        (root / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": make(i, 30)}) for i in range(30)))
    recipe = {
        "root": str(root),
        "output": str(root / "out"),
        "sources": {"text": {"files": ["text.jsonl"]}, "code": {"files": ["code.jsonl"]}},
        "vocabulary": {"size": 320, "characters": 20_000},
        "held_out": 0.2,
    }
    (root / "recipe.yaml").write_text(json.dumps(recipe))
    return root / "recipe.yaml"


def test_it_is_the_vocabulary_that_prepare_trains(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(DataRecipe, path)
    first = train_from_recipe(recipe, tmp_path / "a")
    again = train_from_recipe(recipe, tmp_path / "b")
    prepare(recipe)
    models = [folder / "tokenizer.model" for folder in (tmp_path / "a", tmp_path / "b", Path(recipe.output))]
    assert len({model.read_bytes() for model in models}) == 1
    assert not (tmp_path / "a/.work").exists()
    sizes = {name: entry.bytes for name, entry in first.sample.items()}
    assert sizes["text"] / sum(sizes.values()) == pytest.approx(0.75, abs=0.05)
    assert (first.sample, first.held_out) == (again.sample, again.held_out)
    assert set(first.held_out) == {"text", "code"} and first.held_out["code"].bytes_per_token > 1
    assert 50 < first.pieces_used <= 320  # the rest are single bytes


def test_compression_counts(path: Path) -> None:
    recipe = load_recipe(DataRecipe, path)
    tokenizer = Tokenizer.load(prepare(recipe) and recipe.output)
    texts = ["def river(value):", "日本"]
    ids = [tokenizer.encode(text) for text in texts]
    found = compression(tokenizer, texts)
    assert (found.documents, found.tokens) == (2, sum(map(len, ids)))
    assert found.bytes == sum(len(text.encode()) for text in texts)
    assert found.single_byte_share == pytest.approx(6 / found.tokens)


def test_the_verb(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["tokenizer", "train", "--recipe", str(path), "--output", str(tmp_path / "out")]
    assert main(command) == 0
    output = capsys.readouterr().out
    assert "320 pieces" in output and "held out" in output
    assert main([*command, "--set", "vocabulary.size=310", "--json", "--quiet"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["vocab_size"] == 310 and report["held_out"]["text"]["tokens"] > 0
    assert main([*command, "--vocab-size", "300"]) == 2
    assert "--vocab-size does not go with --recipe" in capsys.readouterr().err
    arguments = ["tokenizer", "train", "--input", str(path), "--output", str(tmp_path), "--set", "a=1"]
    assert main(arguments) == 2


def test_a_queue_is_refused(path: Path, tmp_path: Path) -> None:
    data = json.loads(path.read_text()) | {"executor": {"kind": "slurm"}}
    with pytest.raises(InputError, match="does not wait for a queue"):
        train_from_recipe(from_mapping(DataRecipe, data, "x"), tmp_path)
