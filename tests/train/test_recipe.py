"""Recipes: what YAML becomes, and errors that name file, path and value."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from persimmon.errors import ConfigError, NotFoundError
from persimmon.train.recipe import from_mapping, load_recipe


@dataclass(frozen=True)
class Inner:
    rate: float = 0.1
    steps: int = 3

    def __post_init__(self) -> None:
        if self.rate <= 0:
            raise ConfigError(f"rate must be positive, got {self.rate}")


@dataclass(frozen=True)
class Phase:
    share: float
    inner: Inner = field(default_factory=Inner)


@dataclass(frozen=True)
class Recipe:
    name: str
    flag: bool = False
    limit: float | None = 1.0
    phases: tuple[Phase, ...] = ()
    inner: Inner = field(default_factory=Inner)
    sources: dict[str, Inner] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_everything_a_recipe_can_hold(tmp_path: Path) -> None:
    text = """
name: grün
flag: true
limit: null
phases: [{share: 1}, {share: 0.5, inner: {steps: 7}}]
inner: {rate: 8e-3, steps: 2e6}
sources: {text: {rate: 2}}
extra: {any: [1, two]}
"""
    assert load_recipe(Recipe, written(tmp_path, text)) == Recipe(
        name="grün",
        flag=True,
        limit=None,
        phases=(Phase(1.0), Phase(0.5, Inner(steps=7))),
        inner=Inner(0.008, 2_000_000),
        sources={"text": Inner(2.0)},
        extra={"any": [1, "two"]},
    )


def test_numbers_have_the_declared_type() -> None:
    inner = from_mapping(Inner, {"rate": 1, "steps": 4.0}, "here")
    assert (type(inner.rate), type(inner.steps)) == (float, int)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "recipe.yaml: a recipe is a mapping"),
        ("- 1", "recipe.yaml: a recipe is a mapping"),
        ("name: [", "recipe.yaml: not YAML"),
        ("flag: true", "recipe.yaml: 'name' is missing"),
        ("name: a\nnmae: b", "recipe.yaml: unknown key 'nmae'; known: name, flag"),
        ("name: a\n3: b", "recipe.yaml: unknown key 3; known"),
        ("name: 3", "recipe.yaml: name: expected str, got 3"),
        ("name: a\nflag: 1", "recipe.yaml: flag: expected bool, got 1"),
        ("name: a\nlimit: high", "recipe.yaml: limit: expected float, got 'high'"),
        ("name: a\ninner: {steps: 2.5}", "recipe.yaml: inner.steps: expected int, got 2.5"),
        ("name: a\ninner: {steps: true}", "recipe.yaml: inner.steps: expected int, got True"),
        ("name: a\ninner: {rate: null}", "recipe.yaml: inner.rate: expected float, got None"),
        ("name: a\ninner: 3", "recipe.yaml: inner: expected a mapping, got 3"),
        ("name: a\ninner: {rat: 3}", "recipe.yaml: inner: unknown key 'rat'; known: rate, steps"),
        ("name: a\ninner: {rate: -1}", "recipe.yaml: inner: rate must be positive, got -1.0"),
        ("name: a\nphases: {share: 1}", "recipe.yaml: phases: expected a list"),
        ("name: a\nphases: [{share: 1}, {}]", r"recipe.yaml: phases\[1\]: 'share' is missing"),
        ("name: a\nphases: [{share: 1, inner: {steps: x}}]", r"recipe.yaml: phases\[0\].inner.steps: expected int"),
        ("name: a\nsources: {code: {rate: x}}", "recipe.yaml: sources.code.rate: expected float, got 'x'"),
        ("name: a\nsources: [1]", "recipe.yaml: sources: expected a mapping"),
    ],
)
def test_errors_name_the_path(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(Recipe, written(tmp_path, text))


def test_missing_file_and_wrong_encoding(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no recipe at .*nowhere\.yaml"):
        load_recipe(Recipe, tmp_path / "nowhere.yaml")
    path = tmp_path / "latin.yaml"
    path.write_bytes("name: grün".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"latin\.yaml: not YAML"):
        load_recipe(Recipe, path)


def test_overrides_apply_in_order_and_make_sections(tmp_path: Path) -> None:
    overrides = ["inner.steps=4", "inner.steps=5", "sources.code.rate=1e-2", "limit=null", "phases=[{share: 2}]"]
    recipe = load_recipe(Recipe, written(tmp_path, "name: a"), overrides)
    assert recipe == Recipe(
        name="a", inner=Inner(steps=5), sources={"code": Inner(0.01)}, limit=None, phases=(Phase(2.0),)
    )


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("inner.steps", "--set needs key=value, got 'inner.steps'"),
        ("=3", "--set needs key=value"),
        ("name.first=3", "--set name.first: name is not a section"),
        ("inner.steps=[", r"--set inner.steps: '\[' is not YAML"),
        ("inner.setps=3", "inner: unknown key 'setps'"),
        ("inner.steps=many", "inner.steps: expected int, got 'many'"),
    ],
)
def test_overrides_that_cannot_be(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(Recipe, written(tmp_path, "name: a"), [override])


@pytest.mark.parametrize("name", ["mini", "mini-data", "mini-chat"])
def test_the_recipes_of_the_repository_can_be_read(name: str) -> None:
    from persimmon.data.prepare import DataRecipe
    from persimmon.train.finetune_recipe import FinetuneRecipe
    from persimmon.train.pretrain import PretrainRecipe

    kinds: dict[str, type] = {"mini": PretrainRecipe, "mini-data": DataRecipe, "mini-chat": FinetuneRecipe}
    load_recipe(kinds[name], Path(__file__).parents[2] / "configs" / f"{name}.yaml")
