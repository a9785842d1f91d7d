"""`persimmon finetune RECIPE`: supervised fine-tuning on conversations, loss on the assistant's answers only."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from persimmon import chat
from persimmon.checkpoints import hub
from persimmon.data.conversations import Conversation, read_conversations
from persimmon.data.documents import find_files
from persimmon.data.packing import PackedRows, Row
from persimmon.data.prepare import is_held_out
from persimmon.data.tokens import TokenStore, read_manifest
from persimmon.errors import ConfigError, DataError
from persimmon.model import PersimmonModel
from persimmon.tokenizer import Tokenizer
from persimmon.train.loop import Batch, LoopRecipe, Trainer
from persimmon.train.loss import IGNORE, chunked_cross_entropy
from persimmon.train.parallel import World, run_processes
from persimmon.train.pretrain import Report, process_restored, refuse_overwriting, set_up_process, stack_rows


@dataclass(frozen=True)
class ChatFiles:
    """Files of conversations, and how often each is seen per epoch."""

    files: tuple[str, ...]
    repeat: int = 1


@dataclass(frozen=True)
class ReplayRecipe:
    """Rows of pretraining data mixed in, so that the model does not forget plain text."""

    data: str
    share: float = 0.1
    """Share of the rows of every step."""


@dataclass(frozen=True)
class FinetuneRecipe:
    """Everything about a fine-tuning run."""

    model: str
    """Directory or name of the model to start from."""
    root: str
    """Folder of the conversation files."""
    output: str
    sources: dict[str, ChatFiles]
    epochs: float = 2.0
    row_length: int = 1024
    batch_tokens: int = 8192
    held_out: float = 0.02
    replay: ReplayRecipe | None = None
    loop: LoopRecipe = field(default_factory=LoopRecipe)
    seed: int = 0
    processes: int = 1
    threads: int = 0

    def __post_init__(self) -> None:
        if self.row_length < 2 or self.batch_tokens % self.row_length:
            raise ConfigError(f"batch_tokens {self.batch_tokens} must be a multiple of row_length {self.row_length}")
        if self.epochs <= 0:
            raise ConfigError(f"epochs must be positive, got {self.epochs}")


@dataclass(frozen=True)
class EncodedConversation:
    """Inputs and targets of one conversation; targets outside the answers are IGNORE."""

    token_ids: NDArray[np.int64]
    targets: NDArray[np.int64]
    answer_bytes: int


def encode_conversation(tokenizer: Tokenizer, conversation: Conversation, limit: int) -> EncodedConversation:
    """Tokenize for training, cut behind `limit` positions."""
    ids, mask = chat.encode_for_training(tokenizer, conversation.messages)
    inputs = np.asarray(ids[:-1][:limit], dtype=np.int64)
    targets = np.where(mask[1:], ids[1:], IGNORE)[:limit].astype(np.int64)
    size = sum(len(tokenizer.piece_bytes(int(i))) for i in targets if i != IGNORE)
    return EncodedConversation(inputs, targets, size)


def first_fit(sizes: Sequence[int], length: int, open_rows: int = 64) -> list[list[int]]:
    """Put items of the given sizes into rows of `length`, each whole, keeping roughly their order.

    First fit over the newest `open_rows` unfinished rows: deterministic, a few per cent of padding.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (row, free places) of the open rows
    for item, size in enumerate(sizes):
        for slot, (row, free) in enumerate(room):
            if size <= free:
                rows[row].append(item)
                room[slot] = (row, free - size)
                break
        else:
            rows.append([item])
            room = [*room[-(open_rows - 1) :], (len(rows) - 1, length - size)]
    return rows


class ConversationRows:
    """Endless rows of whole conversations, reshuffled and repacked every epoch."""

    def __init__(self, items: Sequence[EncodedConversation], length: int, pad_id: int, seed: int) -> None:
        if not items:
            raise DataError("no conversations left for training")
        self._items, self._length, self._pad, self._seed = items, length, pad_id, seed
        self._epochs: list[list[list[int]]] = []
        self.rows_per_epoch = len(self._epoch(0))

    def _epoch(self, number: int) -> list[list[int]]:
        while len(self._epochs) <= number:
            seeds = [self._seed, len(self._epochs)]
            order = np.random.Generator(np.random.PCG64(seeds)).permutation(len(self._items))
            packed = first_fit([len(self._items[i].token_ids) for i in order], self._length)
            self._epochs.append([[int(order[i]) for i in row] for row in packed])
        return self._epochs[number]

    def __getitem__(self, row: int) -> Row:
        """Row number `row` of the run; padding is a document of its own without targets."""
        epoch = 0
        while row >= len(self._epoch(epoch)):
            row -= len(self._epoch(epoch))
            epoch += 1
        items = [self._items[i] for i in self._epoch(epoch)[row]]
        boundaries = [0, *np.cumsum([len(item.token_ids) for item in items]).tolist()]
        padding = self._length - boundaries[-1]
        ids = np.concatenate([*(item.token_ids for item in items), np.full(padding, self._pad)])
        targets = np.concatenate([*(item.targets for item in items), np.full(padding, IGNORE)])
        return Row(ids, targets, boundaries + [self._length] * (padding > 0), "chat")


class FinetuneSource:
    """The rows of every step: conversations, and some rows of pretraining data."""

    def __init__(self, recipe: FinetuneRecipe, conversations: ConversationRows) -> None:
        self._length = recipe.row_length
        self._rows = recipe.batch_tokens // recipe.row_length
        self._chat = conversations
        self._replay = _replay_rows(recipe)
        self._replayed = round(self._rows * recipe.replay.share) if recipe.replay else 0
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
        return stack_rows([self._row(step, row) for row in rows])

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


def load_conversations(recipe: FinetuneRecipe) -> tuple[list[Conversation], list[Conversation]]:
    """(training, held out) conversations of all sources; held out by the hash of the first user turn."""
    kept, held = [], []
    for source in recipe.sources.values():
        for path in find_files(Path(recipe.root), source.files):
            for conversation in read_conversations(path):
                first = next(m["content"] for m in conversation.messages if m["role"] == "user")
                if is_held_out(first, recipe.held_out):
                    held.append(conversation)
                else:
                    kept += [conversation] * source.repeat
    return kept, held


@torch.inference_mode()
def answer_bits_per_byte(model: PersimmonModel, items: Sequence[EncodedConversation]) -> float:
    """Bits per UTF-8 byte of the assistant's answers (end-of-text included in the bits)."""
    nats, size = 0.0, 0
    for item in items:
        hidden = model.features(torch.from_numpy(item.token_ids)[None])[0]
        targets = torch.from_numpy(item.targets)
        nats += float(chunked_cross_entropy(hidden, model.lm_head.weight, targets, scale=1.0))
        size += item.answer_bytes
    return nats / float(np.log(2)) / max(1, size)


def _run(world: World, recipe: FinetuneRecipe, resume: bool, report: Report) -> None:
    set_up_process(recipe.threads)
    directory = hub.resolve(recipe.model)
    tokenizer = Tokenizer.load(directory)
    model = hub.load_model(directory, dtype=torch.float32, device=torch.device("cpu"))
    kept, held = load_conversations(recipe)
    encoded = [encode_conversation(tokenizer, c, recipe.row_length) for c in kept]
    rows = ConversationRows(encoded, recipe.row_length, tokenizer.eos_id, recipe.seed)
    source = FinetuneSource(recipe, rows)
    sample = [encode_conversation(tokenizer, c, recipe.row_length) for c in held[:200]]
    evaluate: Callable[[PersimmonModel], dict[str, Any]] | None = None
    if sample:
        evaluate = lambda m: {"answers": round(answer_bits_per_byte(m, sample), 4)}  # noqa: E731
    trainer = Trainer(
        model, source, source.num_steps, recipe.loop, Path(recipe.output), world,
        evaluate, report if world.is_main else lambda row: None,
    )  # fmt: skip
    if resume:
        trainer.resume()
    trainer.run()
    if world.is_main:
        hub.save_model(model, tokenizer, Path(recipe.output) / "model", dtype=torch.bfloat16)


def finetune(recipe: FinetuneRecipe, *, resume: bool, report: Report) -> None:
    """Run (or go on with) a recipe; the result is a model directory at `output`/model."""
    refuse_overwriting(recipe.output, resume)
    os.environ.setdefault("OMP_NUM_THREADS", str(recipe.threads or os.cpu_count() or 1))
    with process_restored():
        run_processes(recipe.processes, _run, recipe, resume, report)
