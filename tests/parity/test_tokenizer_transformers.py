"""Saved tokenizers in transformers: the same ids, the same text, the same chats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from fixtures_tokenizer import exact_tokenizer, hard_text, made_text, release_like_tokenizer
from persimmon import chat
from persimmon.config import preset
from persimmon.tokenizer import END_OF_TEXT, Tokenizer

transformers = pytest.importorskip("transformers")

# Names that are special tokens in transformers, or that the pre-tokenizer cuts where a piece may join.
NOT_EQUAL = (END_OF_TEXT, "<s>", "</s>", "<0x", "<unk")

CHATS = [
    [{"role": "user", "content": "Where is the river?"}],
    [
        {"role": "system", "content": " Answer in few words. "},
        {"role": "user", "content": "def f(x):\n    return x\n"},
        {"role": "assistant", "content": " The function. "},
        {"role": "user", "content": "<0x0A> and <unk>, \u2581 and ☃?"},
    ],
]


def loaded(tokenizer: Tokenizer, directory: Path) -> Any:
    tokenizer.save(directory)
    config = preset("test", vocab_size=tokenizer.vocab_size, bos_token_id=1, eos_token_id=1)
    (directory / "config.json").write_text(json.dumps(config.to_hub()))
    return transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return loaded(exact_tokenizer(), tmp_path_factory.mktemp("exact"))


@pytest.fixture(scope="module")
def release_like(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return loaded(release_like_tokenizer(), tmp_path_factory.mktemp("release"))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=hard_text.filter(lambda text: END_OF_TEXT not in text))
def test_equal_ids_and_text(exact: Any, text: str) -> None:
    tokenizer = exact_tokenizer()
    ids = tokenizer.encode(text, bos=True)
    assert exact(text)["input_ids"] == ids
    assert exact(text, add_special_tokens=False)["input_ids"] == ids[1:]
    assert exact.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids) == text


def test_equal_ids_on_long_text(exact: Any, release_like: Any) -> None:
    text = made_text(7, 600)
    assert exact(text)["input_ids"] == exact_tokenizer().encode(text, bos=True)
    assert release_like(made_text(7, 3))["input_ids"] == release_like_tokenizer().encode(made_text(7, 3), bos=True)


def test_special_pieces(exact: Any, release_like: Any) -> None:
    assert (exact.bos_token_id, exact.eos_token_id, exact.pad_token_id) == (1, 1, None)
    assert (release_like.bos_token, release_like.bos_token_id, release_like.eos_token_id) == (END_OF_TEXT, 400, 400)
    assert len(exact) == exact_tokenizer().vocab_size
    assert len(release_like) == release_like_tokenizer().vocab_size


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=hard_text.filter(lambda text: not any(name in text for name in NOT_EQUAL)))
def test_a_dummy_prefix_vocabulary_is_equal_too(release_like: Any, text: str) -> None:
    tokenizer = release_like_tokenizer()
    ids = tokenizer.encode(text, bos=True)
    assert release_like(text)["input_ids"] == ids
    assert release_like.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)


@pytest.mark.parametrize("messages", CHATS)
def test_chats_are_equal(exact: Any, messages: list[dict[str, str]]) -> None:
    """The text is ours with end-of-text in front, which is how transformers gets its leading id."""
    text = exact.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == END_OF_TEXT + chat.render(messages)
    assert exact.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, bos_token="") == chat.render(
        messages
    )
    ids = exact.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids == chat.encode(exact_tokenizer(), messages)
    answered = [*messages, {"role": "assistant", "content": "Yes."}]
    ids = exact.apply_chat_template(answered, return_dict=False)
    assert ids == chat.encode(exact_tokenizer(), answered, add_generation_prompt=False)


@pytest.mark.parametrize("messages", [[], [{"role": "assistant", "content": "x"}], [{"role": "tool", "content": "x"}]])
def test_wrong_chats_are_refused(exact: Any, messages: list[dict[str, str]]) -> None:
    with pytest.raises(Exception, match=r"alternate|empty"):
        exact.apply_chat_template(messages, tokenize=False)


def test_a_directory_saved_by_transformers_loads_here(exact: Any, tmp_path: Path) -> None:
    exact.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").unlink(missing_ok=True)
    text = made_text(8, 5)
    assert Tokenizer.load(tmp_path).encode(text) == exact_tokenizer().encode(text)
