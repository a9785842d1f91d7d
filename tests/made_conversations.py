"""Conversations and preferences with one rule to learn, as files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

COLOURS = ["red", "green", "blue", "yellow"]
THINGS = ["river", "stone", "garden", "window", "letter", "summer", "hat", "boat", "door", "road", "lamp", "coat"]


def question(thing: str, colour: str) -> str:
    return f"The {thing} is {colour}. What colour is it?"


def write_conversations(path: Path) -> Path:
    """48 questions whose answer stands in them."""
    records: list[dict[str, Any]] = [
        {
            "messages": [
                {"role": "user", "content": question(thing, colour)},
                {"role": "assistant", "content": f"The {thing} is {colour}, very {colour}."},
            ]
        }
        for thing in THINGS
        for colour in COLOURS
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_preferences(path: Path) -> Path:
    """The same questions; the better answer is short, the worse one is rude."""
    records = [
        {"prompt": question(thing, colour), "chosen": f"It is {colour}.", "rejected": f"Look yourself, {thing}!"}
        for thing in THINGS
        for colour in COLOURS
    ]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
