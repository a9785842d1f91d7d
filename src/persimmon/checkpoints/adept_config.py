"""A configuration from the training arguments in Adept's release, held against the shapes of its tensors. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from persimmon.checkpoints import names
from persimmon.checkpoints.tensors import WEIGHT_TYPES, StoredTensor
from persimmon.config import ModelConfig
from persimmon.errors import CheckpointError, ConfigError
from persimmon.tokenizer import Tokenizer

# Arguments that would make it another model, and the only value that they may have where they are given
# (adept-inference `megatron/arguments.py`, `megatron/model/transformer.py`).
_FIXED_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "pos_emb": ("rotary",),
    "sq_relu": (True,),
    "untie_embeddings": (True,),
    "bias_gelu_fusion": (False, None),
    "apply_residual_connection_post_layernorm": (False, None),
    "qk_layernorm": ("weights_per_layer", "weights_per_tensor_parallel_rank_and_layer", "none"),
    "tensor_model_parallel_size": (1, None),
    "pipeline_model_parallel_size": (1, None),
    "num_experts": (None,),
}

# Settings that no shape shows: our field, the release's arguments in order of preference.
_ONLY_ARGUMENTS = (
    ("max_positions", ("max_position_embeddings", "seq_length")),
    ("rotary_base", ("rotary_emb_base",)),
    ("layer_norm_eps", ("layernorm_epsilon",)),
)

_QK_NORM = "layers.{}.self_attn.q_layernorm.weight"

# How far a frequency may be from the exact one when it was rounded to bfloat16 (8 significant bits) and to float32.
_BFLOAT16_ROUNDING = 2.0**-8
_FLOAT32_ROUNDING = 1e-5


def config_from_args(
    args: Mapping[Any, Any], tensors: Sequence[StoredTensor], tokenizer: Tokenizer, source: Path
) -> tuple[ModelConfig, list[str]]:
    """The configuration, and notes for a person.

    Shapes decide what they show, and the arguments must agree with them; the rest comes from the arguments, or is the
    released 8B's with a note that says so. CheckpointError names every argument that does not fit.
    """
    args = {str(key): _plain(value) for key, value in args.items()}
    by_name = {tensor.name: tensor for tensor in tensors}
    buffer = next((tensor for name, tensor in by_name.items() if names.is_inverse_frequency(name)), None)
    shown = _from_shapes(by_name, args, source)
    problems = [
        f"{key} is {args[key]!r}, the tensors show {value!r}"
        for key, value in shown.items()
        if args.get(key) is not None and args[key] != value
    ] + [
        f"{key} is {args[key]!r}, a Persimmon has {' or '.join(map(repr, allowed))}"
        for key, allowed in _FIXED_ARGUMENTS.items()
        if key in args and args[key] not in allowed
    ]
    if problems:
        raise CheckpointError(f"{source}: the training arguments do not fit: {'; '.join(problems)}")
    fields, notes = _from_arguments(args)
    if buffer is not None:
        fields["partial_rotary_factor"] = _rotary_share(buffer, shown["kv_channels"], args.get("rotary_pct"))
    elif "partial_rotary_factor" not in fields:
        notes.append(
            f"rotary_pct is not among the arguments: {ModelConfig.partial_rotary_factor} assumed, as in the 8B"
        )
    try:
        config = ModelConfig(
            vocab_size=shown["padded_vocab_size"],
            hidden_size=shown["hidden_size"],
            intermediate_size=shown["ffn_hidden_size"],
            num_layers=shown["num_layers"],
            num_heads=shown["num_attention_heads"],
            qk_layernorm=names.row(_QK_NORM).adept.format(0) in by_name,
            bos_token_id=tokenizer.bos_id,
            eos_token_id=tokenizer.eos_id,
            **fields,
        )
    except ConfigError as error:
        raise CheckpointError(f"{source}: the training arguments do not fit: {error}") from None
    if buffer is not None:
        notes.append(_frequency_note(buffer, config))
    return config, notes


def _plain(value: Any) -> Any:
    """Numbers, words and None as they are; of anything else only its kind."""
    if isinstance(value, str):
        return value[:80]
    return value if value is None or isinstance(value, int | float) else f"<{type(value).__name__}>"


def _from_shapes(tensors: Mapping[str, StoredTensor], args: Mapping[Any, Any], source: Path) -> dict[str, Any]:
    """What the tensors show, under the names of the release's arguments."""

    def shape(ours: str, dimensions: int) -> tuple[int, ...]:
        name = names.row(ours).adept.format(0)
        tensor = tensors.get(name)
        if tensor is None or len(tensor.shape) != dimensions or 0 in tensor.shape:
            found = "missing" if tensor is None else f"of shape {list(tensor.shape)}"
            raise CheckpointError(f"{source}: not a Persimmon: {name} is {found}")
        return tensor.shape

    vocab_size, hidden_size = shape("embed_tokens.weight", 2)
    every_layer = names.row("layers.{}.input_layernorm.weight").adept
    num_heads: Any = args.get("num_attention_heads")
    num_layers = next(layer for layer in range(len(tensors) + 1) if every_layer.format(layer) not in tensors)
    if names.row(_QK_NORM).adept.format(0) in tensors:
        num_heads = hidden_size // shape(_QK_NORM, 1)[0]
    elif type(num_heads) is not int or num_heads < 1:
        raise CheckpointError(f"{source}: nothing shows the number of heads: num_attention_heads is {num_heads!r}")
    return {
        "padded_vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "ffn_hidden_size": shape("layers.{}.mlp.dense_h_to_4h.weight", 2)[0],
        "num_layers": num_layers,
        "num_attention_heads": num_heads,
        "kv_channels": max(1, hidden_size // max(1, num_heads)),
    }


def _from_arguments(args: Mapping[Any, Any]) -> tuple[dict[str, Any], list[str]]:
    """Fields that no shape shows, and notes on what is assumed or left out."""
    fields: dict[str, Any] = {}
    notes = []
    if args.get("rotary_pct") is not None:
        fields["partial_rotary_factor"] = args["rotary_pct"]
    for field, keys in _ONLY_ARGUMENTS:
        key = next((key for key in keys if args.get(key) is not None), None)
        if key is not None:
            fields[field] = args[key]
        else:
            notes.append(f"{keys[0]} is not among the arguments: {getattr(ModelConfig, field)} assumed, as in the 8B")
    if args.get("hidden_dropout"):
        fields["hidden_dropout"] = args["hidden_dropout"]
        notes.append(f"hidden_dropout {args['hidden_dropout']} in the arguments is metadata and never applied")
    trained = [kind for kind in ("bf16", "fp16") if args.get(kind) is True]
    if trained:
        notes.append(f"trained in {trained[0]}, the arguments say")
    return fields, notes


def _rotary_share(buffer: StoredTensor, head_dim: int, given: Any) -> float:
    """Two dimensions of a head turn with every stored frequency."""
    rotary_dim = 2 * buffer.shape[0] if len(buffer.shape) == 1 else 0
    share = rotary_dim / head_dim
    if int(share * head_dim) < rotary_dim:
        share = math.nextafter(share, 1.0)
    given = share if given is None else given
    if not isinstance(given, int | float) or not rotary_dim <= given * head_dim < rotary_dim + 1:
        raise CheckpointError(
            f"{buffer.file}: rotary_pct is {given!r}, {buffer.name} {list(buffer.shape)} shows {share:g} of {head_dim}"
        )
    return share


def _frequency_note(buffer: StoredTensor, config: ModelConfig) -> str:
    """What the stored `rotary_emb.inv_freq` says about the precision of the positions in training.

    CheckpointError when it belongs to another base: then the arguments are not this model's.
    """
    stored = _read_floats(buffer)
    exact = config.rotary_base ** (-np.arange(0, config.rotary_dim, 2, dtype=np.float64) / config.rotary_dim)
    deviation = float(np.abs(stored / exact - 1.0).max())
    if not deviation <= _BFLOAT16_ROUNDING:
        raise CheckpointError(
            f"{buffer.file}: {buffer.name} deviates by {deviation:.2g} from base {config.rotary_base:g}: "
            "the arguments are not this model's"
        )
    precision = "float32" if deviation < _FLOAT32_ROUNDING else "bfloat16"
    return (
        f"rotary_emb.inv_freq is stored as {WEIGHT_TYPES[buffer.dtype]} and exact to {deviation:.1g}: training kept it "
        f"in {precision}; it is dropped (see --rotary-precision)"
    )


def _read_floats(tensor: StoredTensor) -> NDArray[np.float64]:
    """A small tensor as float64."""
    raw = b"".join(bytes(chunk) for chunk in tensor.chunks())
    if tensor.dtype == "BF16":  # the upper half of a float32
        return (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4").astype(np.float64)
    numpy_types = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}
    if tensor.dtype not in numpy_types:
        raise CheckpointError(f"{tensor.file}: {tensor.name} is {tensor.dtype}, a floating-point type expected")
    return np.frombuffer(raw, numpy_types[tensor.dtype]).astype(np.float64)
