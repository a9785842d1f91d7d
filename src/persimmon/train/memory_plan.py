"""What fine-tuning takes of memory, by part: `persimmon finetune RECIPE --plan`. Arithmetic only, no torch.

Every part is a formula over the configuration; the tests count the bytes of a small model's step and hold each formula
to them. Two things are allowances instead: `reserve`, and in bfloat16 the activations of LayerNorms in float32, which
autocast makes on GPUs and not on CPUs. Bytes are decimal: 24 GB is 24 * 10^9.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from persimmon.accounting import count_parameters
from persimmon.checkpoints.adapters import LoraSettings, count_adapter
from persimmon.config import ModelConfig
from persimmon.errors import InputError
from persimmon.fast.cpu.formats import FORMATS
from persimmon.fast.cpu.packed import planned_bytes

if TYPE_CHECKING:
    from persimmon.train.finetune_recipe import FinetuneRecipe
from persimmon.train.loss import CHUNK, gpu_chunk
from persimmon.train.optimizer import OptimizerRecipe

ITEM_BYTES = {"float32": 4, "bfloat16": 2}
PACKED = ("q8", "q4")
WEIGHTS = (*ITEM_BYTES, *PACKED)

RESERVE_BYTES = 1_500_000_000
"""A GPU's context, its libraries' workspaces and what the allocator cannot use; an allowance, not counted."""

_INT8_STATE = 2 + 8 / 256  # train/adamw8bit.py: two codes, and a float32 scale for each on 256 numbers

# Bytes per token that one block keeps for the backward pass, as multiples of hidden_size and intermediate_size.
# float32: 11 H (input, both norms' outputs, fused projection 3, rotated query and key, attention output, middle of the
# residual stream, its copy) and 2 F (relu and its square). bfloat16: the same in two bytes, and 10 H on top for what
# LayerNorms keep in float32.
_KEPT = {"float32": (44, 8), "bfloat16": (32, 4)}

# ... and what its backward pass makes at the same time: the gradients of both F-wide tensors and a product of them.
_GRADIENT_WIDTHS = 3

_LOGIT_BYTES = {"plain": 12, "packed": 20}  # logits, their float32 form, probabilities, gradients of a chunk
_SLICE_BYTES = 64 << 20  # train/qlora.py
_SLICE_FORMS = 5  # packed codes, codes in plain order, float32, scaled, in the type of the product


@dataclass(frozen=True)
class Setup:
    """How a model is fine-tuned, as far as its memory goes."""

    weights: str
    """Of the model: float32, bfloat16, or q8 and q4 for a packed frozen base."""
    compute: str
    """Of the activations: float32, or bfloat16 by autocast."""
    lora: LoraSettings | None
    """Adapters on a frozen model; None trains all of it."""
    optimizer: str
    """adamw, int8 (AdamW with one-byte moments) or muon."""
    micro_tokens: int
    """Tokens of one forward pass."""
    recompute: bool
    """Blocks are computed again in the backward pass."""

    def __post_init__(self) -> None:
        if self.weights not in WEIGHTS:
            raise InputError(f"weights must be one of {', '.join(WEIGHTS)}, got {self.weights!r}")
        if self.lora is None and self.weights in PACKED:
            raise InputError(f"{self.weights} weights are frozen: a plan for them needs lora")


@dataclass(frozen=True)
class Part:
    """One part of the memory."""

    name: str
    bytes: int
    what: str


def plan(config: ModelConfig, setup: Setup) -> list[Part]:
    """All parts of the peak, which is in the backward pass of the last block.

    Muon's update comes when activations and logits are gone, and takes less: five tensors of the matrices that it makes
    at once (optimizer.py).
    """
    parts = [_model(config, setup), *_training_state(config, setup), *_activations(config, setup)]
    parts += [_loss(config, setup), Part("reserve", RESERVE_BYTES, "GPU context and allocator; an allowance")]
    if setup.weights in PACKED:
        size = _SLICE_FORMS * _SLICE_BYTES
        parts.append(Part("float slices", size, f"{_SLICE_BYTES >> 20} MiB of a packed matrix as floats, in steps"))
    return parts


def total_bytes(parts: list[Part]) -> int:
    """Their sum."""
    return sum(part.bytes for part in parts)


def _model(config: ModelConfig, setup: Setup) -> Part:
    if setup.weights in PACKED:
        size = planned_bytes(config, FORMATS[setup.weights], "BF16")
        return Part("frozen model", size, f"{setup.weights}, embedding in bfloat16")
    size = count_parameters(config).total * ITEM_BYTES[setup.weights]
    return Part("model" if setup.lora is None else "frozen model", size, setup.weights)


def trained_parameters(config: ModelConfig, setup: Setup) -> int:
    """Numbers that the optimizer moves."""
    return count_parameters(config).total if setup.lora is None else count_adapter(config, setup.lora)


def _training_state(config: ModelConfig, setup: Setup) -> list[Part]:
    trained = trained_parameters(config, setup)
    item = 4 if setup.lora is not None else ITEM_BYTES[setup.weights]
    parts = []
    if setup.lora is not None:
        parts.append(Part("adapters", 4 * trained, f"{trained:,} numbers in float32"))
    parts.append(Part("gradients", item * trained, f"{trained:,} numbers of {item} bytes"))
    parts.append(Part("optimizer", optimizer_bytes(config, setup.optimizer, trained), f"moments ({setup.optimizer})"))
    if setup.lora is None and setup.weights == "float32" and setup.compute == "bfloat16":
        count = count_parameters(config)
        size = 2 * (count.total - count.vectors - count.embedding - count.head)
        parts.append(Part("bfloat16 copies", size, "autocast's, of the blocks' matrices"))
    return parts


def optimizer_bytes(config: ModelConfig, optimizer: str, trained: int) -> int:
    """Bytes of the moments of `trained` numbers; muon has one of the block matrices, adamw two of everything."""
    if optimizer == "int8":
        return round(_INT8_STATE * trained)
    if optimizer == "muon":
        matrices = config.num_layers * config.hidden_size * (4 * config.hidden_size + 2 * config.intermediate_size)
        return 4 * matrices + 8 * (trained - matrices)
    return 8 * trained


def block_bytes_per_token(config: ModelConfig, setup: Setup) -> int:
    """What one block keeps for its backward pass."""
    hidden, width = _KEPT[setup.compute]
    statistics = 20 * config.num_heads + 16  # means, deviations and log-sum-exps in float32
    low = 0 if setup.lora is None else ITEM_BYTES[setup.compute] * setup.lora.rank * len(setup.lora.targets)
    return hidden * config.hidden_size + width * config.intermediate_size + statistics + low


def _activations(config: ModelConfig, setup: Setup) -> list[Part]:
    tokens, layers, item = setup.micro_tokens, config.num_layers, ITEM_BYTES[setup.compute]
    block = block_bytes_per_token(config, setup) * tokens
    gradients = (_GRADIENT_WIDTHS * config.intermediate_size + 2 * config.hidden_size) * item * tokens
    # Embedding output, final norm's input and output, and the gradient of the hidden states.
    ends = Part("hidden states", 4 * 4 * config.hidden_size * tokens, "at both ends of the stack")
    if not setup.recompute:
        kept = Part("activations", layers * block, f"{tokens:,} tokens, {layers} blocks")
        return [kept, ends, Part("gradients inside a block", gradients, "of the activations")]
    stream = 4 if setup.weights == "float32" else item  # the residual stream has the embedding's type
    inputs = Part("block inputs", layers * stream * config.hidden_size * tokens, f"{tokens:,} tokens, {layers} blocks")
    return [inputs, ends, Part("one block", block + gradients, "computed again, with its gradients")]


def _loss(config: ModelConfig, setup: Setup) -> Part:
    kind = "packed" if setup.weights in PACKED else "plain"
    # As on a GPU, where the chunks of a small vocabulary are larger; a packed head takes the small ones everywhere.
    chunk = CHUNK if kind == "packed" else gpu_chunk(config.vocab_size)
    size = _LOGIT_BYTES[kind] * min(chunk, setup.micro_tokens) * config.vocab_size
    what = f"{chunk:,} positions at a time"
    if setup.lora is None:  # the head's gradient is summed in float32, chunk by chunk
        size += (4 + ITEM_BYTES[setup.compute]) * config.vocab_size * config.hidden_size
        what += ", and the head's gradient while it is summed"
    return Part("logits", size, what)


# -- from recipes, and advice --------------------------------------------------------------------------------


def optimizer_kind(recipe: OptimizerRecipe) -> str:
    """The optimizer of a recipe by its moments: adamw, int8 or muon."""
    return "int8" if recipe.state == "int8" else recipe.matrices


def setup_of(recipe: FinetuneRecipe, adapter: LoraSettings | None, packed: str | None) -> Setup:
    """The setup of a recipe. adapter: the shape of the adapters it trains. packed: the format of a quantized model."""
    compute = recipe.loop.dtype
    frozen = packed or compute
    rows = max(1, recipe.loop.micro_tokens // recipe.row_length)
    rows = min(rows, -(-recipe.batch_tokens // recipe.row_length // recipe.processes))
    optimizer = recipe.loop.optimizer
    return Setup(
        weights=frozen if adapter is not None else recipe.weights,
        compute=compute,
        lora=adapter,
        optimizer=optimizer_kind(optimizer),
        micro_tokens=rows * recipe.row_length,
        recompute=recipe.loop.activations == "none",
    )


def advice(config: ModelConfig, setup: Setup, budget: int) -> list[tuple[str, int]]:
    """(change, bytes with it and those before it), the mildest first, until the plan fits into `budget` bytes."""
    steps: list[tuple[str, int]] = []
    for change, values in _changes(setup):
        if total_bytes(plan(config, setup)) <= budget:
            break
        setup = dataclasses.replace(setup, **values)
        steps.append((change, total_bytes(plan(config, setup))))
    return steps


def _changes(setup: Setup) -> Iterator[tuple[str, dict[str, Any]]]:
    """Settings that cost time first, then those that change what is trained."""
    if not setup.recompute:
        yield "loop.activations: none", {"recompute": True}
    if setup.lora is None and setup.optimizer != "int8":
        yield "loop.optimizer: {matrices: adamw, state: int8}", {"optimizer": "int8"}
    if setup.lora is None and setup.weights == "float32":
        yield "weights: bfloat16, loop.dtype: bfloat16", {"weights": "bfloat16", "compute": "bfloat16"}
    tokens = setup.micro_tokens
    while tokens > 1024:
        tokens //= 2
        yield f"row_length and loop.micro_tokens: {tokens}", {"micro_tokens": tokens}
    if setup.lora is None:
        frozen = {"lora": LoraSettings(), "optimizer": "adamw", "weights": "bfloat16", "compute": "bfloat16"}
        yield "lora: {rank: 16}, loop.dtype: bfloat16", frozen
    for form in PACKED:
        if setup.weights not in (form, "q4"):
            yield f"model: quantized to {form} (persimmon quantize)", {"weights": form}
