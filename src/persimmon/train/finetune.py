"""`persimmon finetune RECIPE`: supervised fine-tuning or preferences; the whole model, or adapters on a frozen one.

What a recipe asks for follows from what is in it: `lora` trains adapters, on a quantized model's packed weights as
well (QLoRA); `preference` learns from pairs of answers instead of answers. The result is `output`/model or, for
adapters, `output`/adapter in PEFT's form.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from persimmon import lora
from persimmon.chat import Message
from persimmon.checkpoints import hub
from persimmon.checkpoints.adapters import LoraSettings, open_adapter, write_adapter
from persimmon.checkpoints.releases import derived_notice, write_derived_card
from persimmon.data.conversations import Conversation, read_conversations
from persimmon.data.documents import find_files
from persimmon.data.packing import PackedRows, Row
from persimmon.data.preferences import Preference, read_preferences
from persimmon.data.prepare import is_held_out
from persimmon.data.tokens import TokenStore, read_manifest
from persimmon.errors import ConfigError
from persimmon.fast.cpu.packed import is_packed
from persimmon.model import PersimmonModel
from persimmon.tokenizer import Tokenizer
from persimmon.train.conversation_rows import (
    ConversationRows,
    EncodedConversation,
    Item,
    encode_conversation,
    row_seeds,
)
from persimmon.train.loop import Batch, LoopRecipe, Trainer
from persimmon.train.objective import AnswerLoss, Objective, cross_entropy
from persimmon.train.parallel import World, run_processes
from persimmon.train.preference import (
    PreferenceLoss,
    PreferenceRecipe,
    PreferenceSource,
    encode_pair,
    preference_scores,
    reference_margins,
)
from persimmon.train.pretrain import Report, process_restored, refuse_overwriting, set_up_process, stack_rows

_EVALUATED = 200
"""Most held-out conversations, or pairs, that an evaluation reads."""


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
    """Directory or name of the model to start from; a quantized one (q8, q4) for QLoRA."""
    root: str
    """Folder of the conversation files."""
    output: str
    sources: dict[str, ChatFiles]
    lora: LoraSettings | None = None
    """Train adapters of this shape and freeze the model."""
    adapter: str | None = None
    """Go on with the adapter in this directory instead of a fresh one."""
    preference: PreferenceRecipe | None = None
    """Learn from preferences: the sources hold a prompt, a chosen and a rejected answer."""
    neftune_alpha: float = 0.0
    """Noise on the embeddings while training (NEFTune; 5 is usual), 0 for none."""
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
        if not self.neftune_alpha >= 0:
            raise ConfigError(f"neftune_alpha must not be negative, got {self.neftune_alpha}")
        if self.lora is not None and self.adapter is not None:
            raise ConfigError("lora and adapter exclude each other: an adapter that goes on has its shape already")
        if self.trains_adapters and self.loop.optimizer.matrices == "muon":
            raise ConfigError("adapters train with adamw: set loop.optimizer.matrices")
        if self.preference is not None and (self.replay is not None or self.neftune_alpha):
            raise ConfigError("preference goes with neither replay nor neftune_alpha")

    @property
    def trains_adapters(self) -> bool:
        """Whether the model itself stays frozen."""
        return self.lora is not None or self.adapter is not None


# -- data ----------------------------------------------------------------------------------------------------


class FinetuneSource:
    """The rows of every step: conversations, and some rows of pretraining data."""

    def __init__(self, recipe: FinetuneRecipe, conversations: ConversationRows) -> None:
        self._length, self._seed = recipe.row_length, recipe.seed
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


def load_conversations(recipe: FinetuneRecipe) -> tuple[list[Conversation], list[Conversation]]:
    """(training, held out) conversations of all sources; held out by the hash of the first user turn."""
    kept: list[Conversation] = []
    held: list[Conversation] = []
    for source, path in _files(recipe):
        for conversation in read_conversations(path):
            if _is_held_out(conversation.messages, recipe):
                held.append(conversation)
            else:
                kept += [conversation] * source.repeat
    return kept, held


def load_preferences(recipe: FinetuneRecipe) -> tuple[list[Preference], list[Preference]]:
    """(training, held out) preferences of all sources; held out by the hash of the first user turn."""
    kept: list[Preference] = []
    held: list[Preference] = []
    for source, path in _files(recipe):
        for preference in read_preferences(path):
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


def _encoded(recipe: FinetuneRecipe, tokenizer: Tokenizer, found: Sequence[Conversation]) -> list[EncodedConversation]:
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


def _encoded_pairs(recipe: FinetuneRecipe, tokenizer: Tokenizer, found: Sequence[Preference]) -> list[Item]:
    """The pairs that fit into a row; the others are counted and left out."""
    pairs = [encode_pair(tokenizer, preference, recipe.row_length) for preference in found]
    kept = [pair for pair in pairs if pair is not None]
    if len(kept) < len(pairs):
        lost = len(pairs) - len(kept)
        warnings.warn(
            f"{lost} of {len(pairs)} pairs are longer than a row of {recipe.row_length} tokens: left out", stacklevel=2
        )
    return kept


# -- the model -----------------------------------------------------------------------------------------------


def load_for_training(recipe: FinetuneRecipe, directory: Path) -> tuple[PersimmonModel, LoraSettings | None]:
    """The model with what the recipe trains on it, and the shape of its adapters if it has some.

    A frozen base is held in the type of the matrix products, a model that trains in float32.
    """
    compute = torch.float32 if recipe.loop.dtype == "float32" else torch.bfloat16
    if is_packed(directory):
        if not recipe.trains_adapters:
            raise ConfigError(f"{recipe.model} is quantized: its weights cannot train, adapters on it can (lora)")
        from persimmon.train.qlora import load_packed_model

        model = load_packed_model(directory, dtype=compute)
    else:
        model = hub.load_model(directory, dtype=compute if recipe.trains_adapters else torch.float32)
    if recipe.lora is not None:
        lora.attach(model, recipe.lora, seed=recipe.seed)
        return model, recipe.lora
    if recipe.adapter is not None:
        return model, lora.load_adapter(model, Path(recipe.adapter)).settings
    return model, None


@torch.inference_mode()
def answer_bits_per_byte(model: PersimmonModel, items: Sequence[EncodedConversation]) -> float:
    """Bits per UTF-8 byte of the assistant's answers (end-of-text included in the bits)."""
    model.eval()
    nats, size = 0.0, 0
    for item in items:
        hidden = model.features(torch.from_numpy(item.token_ids)[None])[0]
        nats += float(cross_entropy(model, hidden, torch.from_numpy(item.targets), 1.0))
        size += item.answer_bytes
    return nats / float(torch.log(torch.tensor(2.0))) / max(1, size)


def save_result(
    recipe: FinetuneRecipe, model: PersimmonModel, settings: LoraSettings | None, tokenizer: Tokenizer, base: Path
) -> Path:
    """Write what the run made, with a card that states the base and its licence: adapters, or the model in bfloat16."""
    output = Path(recipe.output)
    if settings is not None:
        tensors = {name: hub.as_tensor_data(name, tensor) for name, tensor in lora.adapter_tensors(model).items()}
        write_adapter(output / "adapter", settings, tensors, recipe.model, base)
        return output / "adapter"
    what = "Fine-tuned as a whole" + (" on preferences." if recipe.preference else " on conversations.")
    hub.save_model(
        model, tokenizer, output / "model", dtype=torch.bfloat16,
        extra=lambda partial: write_derived_card(partial, recipe.model, base, what),
    )  # fmt: skip
    return output / "model"


# -- the run -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Task:
    """What a run learns from, what it minimises, and how it is judged."""

    source: Any
    num_steps: int
    objective: Objective
    evaluate: Callable[[PersimmonModel], dict[str, Any]] | None


def _answers(recipe: FinetuneRecipe, tokenizer: Tokenizer) -> _Task:
    kept, held = load_conversations(recipe)
    items = [(item,) for item in _encoded(recipe, tokenizer, kept)]
    rows = ConversationRows(items, recipe.row_length, tokenizer.eos_id, recipe.seed)
    source = FinetuneSource(recipe, rows)
    sample = _encoded(recipe, tokenizer, held[:_EVALUATED])
    evaluate: Callable[[PersimmonModel], dict[str, Any]] | None = None
    if sample:
        evaluate = lambda model: {"answers": round(answer_bits_per_byte(model, sample), 4)}  # noqa: E731
    return _Task(source, source.num_steps, AnswerLoss(recipe.neftune_alpha), evaluate)


def _preferences(recipe: FinetuneRecipe, tokenizer: Tokenizer, model: PersimmonModel) -> _Task:
    assert recipe.preference is not None
    settings = recipe.preference
    kept, held = load_preferences(recipe)
    items, sample = (_encoded_pairs(recipe, tokenizer, found) for found in (kept, held[:_EVALUATED]))
    rows = ConversationRows(items, recipe.row_length, tokenizer.eos_id, recipe.seed)
    per_step = recipe.batch_tokens // recipe.row_length
    reference = reference_margins(model, items, lambda done: None)
    source = PreferenceSource(items, reference, rows, per_step, recipe.row_length, recipe.seed)
    evaluate: Callable[[PersimmonModel], dict[str, Any]] | None = None
    if sample:
        known = reference_margins(model, sample, lambda done: None)
        evaluate = lambda model: preference_scores(model, sample, known, settings)  # noqa: E731
    steps = max(1, round(recipe.epochs * rows.rows_per_epoch / per_step))
    return _Task(source, steps, PreferenceLoss(settings), evaluate)


def _run(world: World, recipe: FinetuneRecipe, resume: bool, report: Report) -> None:
    set_up_process(recipe.threads)
    directory = hub.resolve(recipe.model)
    tokenizer = Tokenizer.load(directory)
    model, settings = load_for_training(recipe, directory)
    task = _preferences(recipe, tokenizer, model) if recipe.preference else _answers(recipe, tokenizer)
    trainer = Trainer(
        model, task.source, task.num_steps, recipe.loop, Path(recipe.output), world,
        task.evaluate, report if world.is_main else lambda row: None, task.objective,
    )  # fmt: skip
    if resume:
        trainer.resume()
    trainer.run()
    if world.is_main:
        save_result(recipe, model, settings, tokenizer, directory)


def finetune(recipe: FinetuneRecipe, *, resume: bool, report: Report) -> None:
    """Run (or go on with) a recipe; the result is a directory at `output`/model or `output`/adapter."""
    refuse_overwriting(recipe.output, resume)
    notice = derived_notice(hub.resolve(recipe.model))
    if notice is not None:
        warnings.warn(notice, stacklevel=2)
    if recipe.adapter is not None:  # a wrong one shows before any process starts
        from persimmon.checkpoints.directory import read_config

        open_adapter(Path(recipe.adapter), read_config(hub.resolve(recipe.model)))
    os.environ.setdefault("OMP_NUM_THREADS", str(recipe.threads or os.cpu_count() or 1))
    with process_restored():
        run_processes(recipe.processes, _run, recipe, resume, report)
