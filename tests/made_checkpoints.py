"""Small made models, vocabularies and release files for the checkpoint tests."""

from __future__ import annotations

import argparse
import io
import random
import tarfile
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from persimmon.checkpoints import names
from persimmon.config import ModelConfig
from persimmon.model import PersimmonModel
from persimmon.tokenizer import END_OF_TEXT, Tokenizer
from persimmon.tokenizer_files.model_proto import PieceType, new_model

SHAPE: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 40, "num_layers": 2, "num_heads": 2}


def made_tokenizer(unused: Sequence[int] = (), dummy_prefix: bool = False) -> Tokenizer:
    """Bytes, letters, a few words; `unused` are ids at which a piece marked as unused is put in."""
    entries: list[tuple[str, PieceType]] = [("<unk>", PieceType.UNKNOWN), (END_OF_TEXT, PieceType.CONTROL)]
    entries += [(f"<0x{byte:02X}>", PieceType.BYTE) for byte in range(256)]
    text = [*"\u2581abcdefghijklmnopqrstuvwxyz.,:\n", "\u2581the", "\u2581human", "adept", "ing", "er"]
    entries += [(piece, PieceType.NORMAL) for piece in text]
    for index in sorted(unused):
        entries.insert(index, (f"<spare{index}>", PieceType.UNUSED))
    model = new_model()
    for index, (piece, kind) in enumerate(entries):
        score = -index / 128 if kind == PieceType.NORMAL else 0.0
        model.pieces.add(piece=piece, score=score, type=int(kind))
    model.trainer_spec.model_type = 1
    model.trainer_spec.byte_fallback = True
    model.trainer_spec.vocab_size = len(entries)
    model.trainer_spec.bos_id = next(i for i, (piece, _) in enumerate(entries) if piece == END_OF_TEXT)
    model.trainer_spec.eos_id = model.trainer_spec.pad_id = -1
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = dummy_prefix
    model.normalizer_spec.remove_extra_whitespaces = False
    return Tokenizer(model.SerializeToString(deterministic=True))


def made_config(tokenizer: Tokenizer, **changes: Any) -> ModelConfig:
    """A tiny model for the vocabulary."""
    vocabulary = {
        "vocab_size": tokenizer.vocab_size,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
    }
    return ModelConfig(**{**SHAPE, **vocabulary, **changes})


def made_model(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> PersimmonModel:
    """Random weights everywhere, biases and norms included, so that no mix-up of tensors stays unseen."""
    model = PersimmonModel(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if name.endswith("norm.weight") else 0.0, 0.2, generator=generator)
    return model.to(dtype)


def same_tensors(first: PersimmonModel, second: PersimmonModel) -> bool:
    """Whether two models are equal bit for bit, types included."""
    one, other = first.state_dict(), second.state_dict()
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


# -- Adept's release -----------------------------------------------------------------------------------------


def release_args(config: ModelConfig, **changes: Any) -> argparse.Namespace:
    """The training arguments that matter, and some that do not."""
    return argparse.Namespace(
        **{
            "num_layers": config.num_layers,
            "hidden_size": config.hidden_size,
            "ffn_hidden_size": config.intermediate_size,
            "num_attention_heads": config.num_heads,
            "kv_channels": config.head_dim,
            "padded_vocab_size": config.vocab_size,
            "max_position_embeddings": config.max_positions,
            "seq_length": config.max_positions,
            "rotary_emb_base": int(config.rotary_base),
            "rotary_pct": config.partial_rotary_factor,
            "layernorm_epsilon": config.layer_norm_eps,
            "qk_layernorm": "weights_per_layer",
            "pos_emb": "rotary",
            "sq_relu": True,
            "untie_embeddings": True,
            "bf16": True,
            "params_dtype": torch.bfloat16,
            "tensor_model_parallel_size": 1,
            "save": "/some/where",
            "lr": np.float64(1e-4),
            **changes,
        }
    )


def release_state(model: PersimmonModel, frequency_type: torch.dtype = torch.float32, **args: Any) -> dict[str, Any]:
    """What `torch.save` got in the release: nested dictionaries, random states, the training arguments."""
    config = model.config
    state, nested = model.state_dict(), {}
    for parameter in names.parameters(config):
        _put(nested, parameter.adept, state[parameter.ours])
    exponents = torch.arange(0, config.rotary_dim, 2, dtype=torch.float32) / config.rotary_dim
    frequencies = (1.0 / config.rotary_base**exponents).to(frequency_type)
    for layer in range(config.num_layers):
        name = f"language_model.encoder.layers.{layer}.self_attention.rotary_emb.inv_freq"
        _put(nested, name, frequencies.clone())
    return {
        "args": release_args(config, **args),
        "checkpoint_version": 3.0,
        "iteration": 1251,
        "model": nested,
        "rng_state": [
            {
                "random_rng_state": random.Random(0).getstate(),
                "np_rng_state": np.random.RandomState(0).get_state(),
                "torch_rng_state": torch.get_rng_state(),
                "rng_tracker_states": {"model-parallel-rng": torch.get_rng_state()},
            }
        ],
    }


def _put(tree: dict[str, Any], name: str, value: Any) -> None:
    """As Megatron nests: the encoder's tensors under one flat dictionary, the others one by one."""
    if name.startswith("language_model.encoder."):
        path, last = ["language_model", "encoder"], name.removeprefix("language_model.encoder.")
    else:
        *path, last = name.split(".")
    for key in path:
        tree = tree.setdefault(key, OrderedDict())
    tree[last] = value


def write_release(
    file: Path, state: dict[str, Any], vocabulary: bytes | None, *, legacy: bool = False, protocol: int = 2
) -> Path:
    """A tar laid out like the published ones."""
    weights = io.BytesIO()
    torch.save(state, weights, _use_new_zipfile_serialization=not legacy, pickle_protocol=protocol)
    content = {
        "latest_checkpointed_iteration.txt": b"1251",
        "iter_0001251/mp_rank_00/model_optim_rng.pt": weights.getvalue(),
        "adept_vocab.vocab": b"<unk>\t0\n",
    }
    if vocabulary is not None:
        content["adept_vocab.model"] = vocabulary
    with tarfile.open(file, "w") as archive:
        for name, data in content.items():
            info = tarfile.TarInfo(f"{file.stem}/{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file
