"""Small made corpora and recipes for the training tests."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import yaml

_WORDS = ["river", "stone", "light", "garden", "window", "story", "green", "walk", "quiet", "letter", "summer", "north"]


def made_text(seed: int, sentences: int) -> str:
    rng = random.Random(seed)
    lines = [" ".join(rng.choices(_WORDS, k=rng.randint(3, 9))).capitalize() + "." for _ in range(sentences)]
    return "\n".join(lines)


def made_code(seed: int, functions: int) -> str:
    rng = random.Random(seed)
    return "\n\n".join(
        f"def {rng.choice(_WORDS)}_{i}(value):\n    return value + {rng.randint(0, 99)}" for i in range(functions)
    )


def write_recipe(settings: dict[str, Any], path: Path) -> Path:
    path.write_text(yaml.safe_dump(settings))
    return path
