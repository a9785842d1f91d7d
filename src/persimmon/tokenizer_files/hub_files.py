"""What the hub keeps beside a vocabulary: `tokenizer_config.json` and `special_tokens_map.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from persimmon.atomic import write_bytes, write_text
from persimmon.tokenizer_files.chat_template import CHAT_TEMPLATE
from persimmon.tokenizer_files.model_proto import read_model
from persimmon.tokenizer_files.tokenizer_json import to_json

MODEL_FILE = "tokenizer.model"
JSON_FILE = "tokenizer.json"


def write_files(directory: Path, content: bytes, eos_id: int) -> None:
    """Write `tokenizer.model` with `content` and the hub's three files made from it, each in one step."""
    model = read_model(content)
    end_of_text = model.pieces[eos_id].piece
    directory.mkdir(parents=True, exist_ok=True)
    write_bytes(directory / MODEL_FILE, content)
    compact = json.dumps(to_json(model, eos_id), ensure_ascii=False, separators=(",", ":"))
    write_text(directory / JSON_FILE, compact)
    _write_json(directory / "tokenizer_config.json", _configuration(end_of_text))
    _write_json(directory / "special_tokens_map.json", {"bos_token": end_of_text, "eos_token": end_of_text})


def _configuration(end_of_text: str) -> dict[str, Any]:
    """Settings as on the hub: end-of-text in front of every text, nothing behind, no padding piece."""
    return {
        # Stands for "whatever tokenizer.json says" in transformers 4 and 5.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end_of_text,
        "eos_token": end_of_text,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }


def _write_json(path: Path, document: dict[str, Any]) -> None:
    write_text(path, json.dumps(document, ensure_ascii=False, indent=2) + "\n")
