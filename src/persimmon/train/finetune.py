"""`persimmon finetune RECIPE`: supervised fine-tuning or preferences; the whole model, or adapters on a frozen one.

What a recipe asks for follows from what is in it: `lora` trains adapters, on a quantized model's packed weights as
well (QLoRA); `preference` learns from pairs of answers instead of answers. The result is `output`/model or, for
adapters, `output`/adapter in PEFT's form.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from persimmon import lora
from persimmon.checkpoints import hub
from persimmon.checkpoints.adapters import LoraSettings, open_adapter, write_adapter
from persimmon.checkpoints.directory import read_config
from persimmon.checkpoints.releases import derived_notice, write_derived_card
from persimmon.data.documents import OnBad
from persimmon.data.tokens import check_vocabulary
from persimmon.errors import ConfigError
from persimmon.fast.cpu.packed import is_packed
from persimmon.model import PersimmonModel
from persimmon.tokenizer import Tokenizer
from persimmon.train.conversation_rows import ConversationRows, EncodedConversation
from persimmon.train.finetune_data import (
    FinetuneSource,
    LeftOut,
    encode_all,
    encode_pairs,
    load_conversations,
    load_preferences,
)
from persimmon.train.finetune_recipe import FinetuneRecipe
from persimmon.train.loop import Trainer
from persimmon.train.objective import AnswerLoss, Objective, cross_entropy
from persimmon.train.parallel import World, run_processes
from persimmon.train.preference import PreferenceLoss, PreferenceSource, preference_scores, reference_margins
from persimmon.train.pretrain import Report, process_restored, refuse_overwriting, set_up_process

_EVALUATED = 200
"""Most held-out conversations, or pairs, that an evaluation reads."""


# -- the model -----------------------------------------------------------------------------------------------


def load_for_training(recipe: FinetuneRecipe, directory: Path) -> tuple[PersimmonModel, LoraSettings | None]:
    """The model with what the recipe trains on it, and the shape of its adapters if it has some.

    A frozen base is held in the type of the matrix products, a model that trains in that of `weights`.
    """
    compute = torch.float32 if recipe.loop.dtype == "float32" else torch.bfloat16
    if is_packed(directory):
        if not recipe.trains_adapters:
            raise ConfigError(f"{recipe.model} is quantized: its weights cannot train, adapters on it can (lora)")
        from persimmon.train.qlora import load_packed_model

        model = load_packed_model(directory, dtype=compute)
    else:
        model = hub.load_model(directory, dtype=compute if recipe.trains_adapters else getattr(torch, recipe.weights))
    settings = recipe.lora
    if settings is not None:
        lora.attach(model, settings, seed=recipe.seed)
    elif recipe.adapter is not None:
        settings = lora.load_adapter(model, Path(recipe.adapter)).settings
    return model, settings


@torch.inference_mode()
def answer_bits_per_byte(model: PersimmonModel, items: Sequence[EncodedConversation]) -> float:
    """Bits per UTF-8 byte of the assistant's answers (end-of-text included in the bits)."""
    model.eval()
    nats, size, device = 0.0, 0, next(model.parameters()).device
    for item in items:
        hidden = model.features(torch.from_numpy(item.token_ids)[None].to(device))[0]
        nats += float(cross_entropy(model, hidden, torch.from_numpy(item.targets).to(device), 1.0))
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


def _answers(recipe: FinetuneRecipe, tokenizer: Tokenizer, on_bad: OnBad) -> _Task:
    if recipe.replay is not None:
        check_vocabulary(Path(recipe.replay.data), tokenizer.serialized)
    kept, held = load_conversations(recipe, on_bad)
    items = [(item,) for item in encode_all(recipe, tokenizer, kept)]
    rows = ConversationRows(items, recipe.row_length, tokenizer.eos_id, recipe.seed)
    source = FinetuneSource(recipe, rows)
    sample = encode_all(recipe, tokenizer, held[:_EVALUATED])
    evaluate: Callable[[PersimmonModel], dict[str, Any]] | None = None
    if sample:
        evaluate = lambda model: {"answers": round(answer_bits_per_byte(model, sample), 4)}  # noqa: E731
    return _Task(source, source.num_steps, AnswerLoss(recipe.neftune_alpha), evaluate)


def _preferences(recipe: FinetuneRecipe, tokenizer: Tokenizer, model: PersimmonModel, on_bad: OnBad) -> _Task:
    assert recipe.preference is not None
    settings = recipe.preference
    kept, held = load_preferences(recipe, on_bad)
    items, sample = (encode_pairs(recipe, tokenizer, found) for found in (kept, held[:_EVALUATED]))
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
    left_out = LeftOut(recipe)
    if recipe.preference:
        task = _preferences(recipe, tokenizer, model, left_out)
    else:
        task = _answers(recipe, tokenizer, left_out)
    if world.is_main:
        left_out.tell()
    trainer = Trainer(
        model, task.source, task.num_steps, recipe.loop, Path(recipe.output), world,
        task.evaluate, report if world.is_main else lambda row: None, objective=task.objective,
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
        open_adapter(Path(recipe.adapter), read_config(hub.resolve(recipe.model)))
    os.environ.setdefault("OMP_NUM_THREADS", str(recipe.threads or os.cpu_count() or 1))
    with process_restored():
        run_processes(recipe.processes, _run, recipe, resume, report)
