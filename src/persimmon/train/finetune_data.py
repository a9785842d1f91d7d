"""The data of a fine-tuning run: conversations or preferences from files, held out, encoded, row by row."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from persimmon.atomic import write_text
from persimmon.chat import Message
from persimmon.data.conversations import Conversation, read_conversations
from persimmon.data.documents import OnBad, find_files
from persimmon.data.packing import PackedRows, Row
from persimmon.data.preferences import Preference, read_preferences
from persimmon.data.prepare import is_held_out
from persimmon.data.tokens import TokenStore, read_manifest
from persimmon.errors import ConfigError, DataError
from persimmon.tokenizer import Tokenizer
from persimmon.train.conversation_rows import (
    ConversationRows,
    EncodedConversation,
    Item,
    encode_conversation,
    row_seeds,
)
from persimmon.train.finetune_recipe import ChatFiles, FinetuneRecipe
from persimmon.train.loop import Batch
from persimmon.train.preference import encode_pair
from persimmon.train.pretrain import stack_rows


class FinetuneSource:
    """The rows of every step: conversations, and some rows of pretraining data."""

    def __init__(self, recipe: FinetuneRecipe, conversations: ConversationRows) -> None:
        self._length, self._seed = recipe.row_length, recipe.seed
        self._rows = recipe.batch_tokens // recipe.row_length
        self._chat = conversations
        self._replay = _replay_rows(recipe)
        self._replayed = round(self._rows * recipe.replay.share) if recipe.replay else 0
        if recipe.replay and not self._replayed:
            raise ConfigError(
                f"replay.share {recipe.replay.share} of the {self._rows} rows of a step is less than half a row: "
                "raise it or batch_tokens, or leave replay out"
            )
        self._fresh = self._rows - self._replayed
        if self._fresh < 1:
            raise ConfigError("replay.share leaves no row for conversations")
        self.num_steps = max(1, round(recipe.epochs * conversations.rows_per_epoch / self._fresh))

    def rows(self, step: int) -> int:
        """Rows of a step."""
        return self._rows

    def row_length(self, step: int) -> int:
        """Tokens per row."""
        return self._length

    def batch(self, step: int, rows: Sequence[int]) -> Batch:
        """Some of the step's rows: the first ones are conversations, the last ones replayed text."""
        packed = stack_rows([self._row(step, row) for row in rows])
        return Batch(packed.token_ids, packed.targets, packed.documents, row_seeds(self._seed, step, rows))

    def _row(self, step: int, row: int) -> Row:
        if row < self._fresh or self._replay is None:
            return self._chat[step * self._fresh + row]
        return self._replay[step * self._replayed + row - self._fresh]


def _replay_rows(recipe: FinetuneRecipe) -> PackedRows | None:
    if recipe.replay is None:
        return None
    directory = Path(recipe.replay.data)
    facts = read_manifest(directory)["sources"]
    stores = {name: TokenStore(directory, name) for name in facts}
    # Another seed than pretraining's: other rows than those the last steps saw.
    return PackedRows(stores, {n: f["weight"] for n, f in facts.items()}, recipe.row_length, recipe.seed + 1)


class LeftOut:
    """What the recipe says to do at a broken record: stop there, or go on without it and tell at the end."""

    def __init__(self, recipe: FinetuneRecipe) -> None:
        self._stops, self._path = recipe.on_error == "stop", Path(recipe.output) / "dropped.jsonl"
        self.errors: list[str] = []
        """What is wrong with each record that is left out; file and line come first."""

    def __call__(self, error: DataError) -> None:
        """Raise the error, or note it."""
        if self._stops:
            raise error
        self.errors.append(str(error))

    def tell(self) -> None:
        """Name them all in `output`/dropped.jsonl, as `data prepare` does, and warn of their number."""
        if not self.errors:
            self._path.unlink(missing_ok=True)  # of data that has been mended since
            return
        lines = [{"origin": error.split(": ")[0], "reason": "broken", "error": error} for error in self.errors]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self._path, "".join(json.dumps(line) + "\n" for line in lines))
        warnings.warn(
            f"broken and left out: {len(lines)} (named in {self._path}); the first: {self.errors[0]}", stacklevel=2
        )


def load_conversations(
    recipe: FinetuneRecipe, on_bad: OnBad | None = None
) -> tuple[list[Conversation], list[Conversation]]:
    """(training, held out) conversations of all sources; held out by the hash of the first user turn.

    on_bad: gets what is wrong with a record; default what the recipe says.
    """
    on_bad = on_bad or LeftOut(recipe)
    kept: list[Conversation] = []
    held: list[Conversation] = []
    for source, path in _files(recipe):
        for conversation in read_conversations(path, on_bad):
            if _is_held_out(conversation.messages, recipe):
                held.append(conversation)
            else:
                kept += [conversation] * source.repeat
    return kept, held


def load_preferences(recipe: FinetuneRecipe, on_bad: OnBad | None = None) -> tuple[list[Preference], list[Preference]]:
    """(training, held out) preferences of all sources; held out by the hash of the first user turn.

    on_bad: as for `load_conversations`.
    """
    on_bad = on_bad or LeftOut(recipe)
    kept: list[Preference] = []
    held: list[Preference] = []
    for source, path in _files(recipe):
        for preference in read_preferences(path, on_bad):
            if _is_held_out(preference.chosen, recipe):
                held.append(preference)
            else:
                kept += [preference] * source.repeat
    return kept, held


def _files(recipe: FinetuneRecipe) -> Iterator[tuple[ChatFiles, Path]]:
    for source in recipe.sources.values():
        for path in find_files(Path(recipe.root), source.files):
            yield source, path


def _is_held_out(messages: Sequence[Message], recipe: FinetuneRecipe) -> bool:
    return is_held_out(next(m["content"] for m in messages if m["role"] == "user"), recipe.held_out)


def encode_all(
    recipe: FinetuneRecipe, tokenizer: Tokenizer, found: Sequence[Conversation]
) -> list[EncodedConversation]:
    """The conversations that teach something; those whose answers lie beyond a row are counted and left out."""
    items = [encode_conversation(tokenizer, c.messages, recipe.row_length) for c in found]
    kept = [item for item in items if item.teaches]
    if len(kept) < len(items):
        lost = len(items) - len(kept)
        warnings.warn(
            f"{lost} of {len(items)} conversations have no answer within {recipe.row_length} tokens: left out",
            stacklevel=2,
        )
    return kept


def encode_pairs(recipe: FinetuneRecipe, tokenizer: Tokenizer, found: Sequence[Preference]) -> list[Item]:
    """The pairs that fit into a row; the others are counted and left out."""
    pairs = [encode_pair(tokenizer, preference, recipe.row_length) for preference in found]
    kept = [pair for pair in pairs if pair is not None]
    if len(kept) < len(pairs):
        lost = len(pairs) - len(kept)
        warnings.warn(
            f"{lost} of {len(pairs)} pairs are longer than a row of {recipe.row_length} tokens: left out", stacklevel=2
        )
    return kept
