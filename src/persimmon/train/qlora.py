"""QLoRA (Dettmers et al. 2023) on the engine's own formats: a frozen base that stays packed in `q8` or `q4`.

A packed matrix is turned into floats a slice of rows at a time, in the forward pass and again in the backward pass;
nothing but the packed bytes is kept between the two. So the base costs what its files cost (formats.py), and at most
SLICE_BYTES of it exist as floats. The embedding stays as it was, looked up row by row; the head is packed too.

Everything here is plain torch, so it runs wherever torch does. Only inputs have gradients: the base is frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from persimmon.checkpoints.hub import map_tensor
from persimmon.errors import InputError
from persimmon.fast.cpu.formats import GROUP, SUPERBLOCK, row_bytes
from persimmon.fast.cpu.packed import PackedDirectory, open_packed
from persimmon.fast.cpu.unpacking import (
    cut_superblocks,
    half_scales,
    nibbles,
    plain_order,
    plane_codes,
    plane_scales,
    record_parts,
)
from persimmon.model import PersimmonModel

FORMATS = ("q8", "q4")
"""The packed formats that can be trained on; p44's MLP planes have no reader here."""

SLICE_BYTES = 64 << 20
"""Most float32 bytes of a matrix that exist at a time."""


# -- reading superblocks -------------------------------------------------------------------------------------


def _scaled(codes: Tensor, scales: Tensor) -> Tensor:
    """Codes [R, 256 S] times their groups' scales [R, 8 S] -> float32 [R, 256 S]."""
    groups = codes.float().view(len(codes), -1, GROUP)
    return (groups * scales.float()[..., None]).flatten(1)


def unpack_q8(rows: Tensor) -> Tensor:
    """Rows of q8 superblocks [R, bytes] -> float32 [R, 256 S]."""
    blocks = cut_superblocks(rows, 272)
    return _scaled(plain_order(blocks[..., :SUPERBLOCK]).view(torch.int8), half_scales(blocks[..., SUPERBLOCK:]))


def unpack_q4(rows: Tensor) -> Tensor:
    """Rows of q4 superblocks [R, bytes] -> float32 [R, 256 S]."""
    blocks = cut_superblocks(rows, 144)
    return _scaled(nibbles(blocks[..., :128]).to(torch.int8) - 8, half_scales(blocks[..., 128:]))


def unpack_int8(rows: Tensor) -> Tensor:
    """Rows of int8 superblocks in plain order [R, bytes] -> float32 [R, 256 S]."""
    blocks = cut_superblocks(rows, 272)
    codes = blocks[..., :SUPERBLOCK].reshape(len(rows), -1).view(torch.int8)
    return _scaled(codes, half_scales(blocks[..., SUPERBLOCK:]))


def unpack_records(records: Tensor) -> Tensor:
    """Records of 32 neurons' int4 rows [R, bytes] -> float32 [32 R, outputs]."""
    codes, scales = record_parts(records)
    neurons = (codes.to(torch.int8) - 8).float().view(len(records), GROUP, -1)
    return (neurons * scales.float()[:, None]).flatten(0, 1)


def unpack_planes(top: Tensor, rest: Tensor) -> Tensor:
    """Top and rest rows of int8 weights in planes -> float32 [R, 256 S]."""
    inputs = rest.shape[1] // row_bytes("rest", SUPERBLOCK) * SUPERBLOCK
    return _scaled(plane_codes(top, rest, inputs).to(torch.int16) - 128, plane_scales(top, inputs))


_READERS: dict[str, Callable[..., Tensor]] = {
    "q8": unpack_q8,
    "q4": unpack_q4,
    "int8": unpack_int8,
    "planes": unpack_planes,
    "records": unpack_records,
}


# -- products ------------------------------------------------------------------------------------------------


class PackedLinear(nn.Module):
    """y = x W^T + b with a packed, frozen W."""

    def __init__(
        self, kind: str, planes: tuple[Tensor, ...], columns: int, bias: Tensor | None, *, neurons: int | None = None
    ) -> None:
        """`planes`: bytes [rows, ..] that `kind` reads together, `columns` floats a row; the rest is padding.

        neurons: given where the rows are W's columns, as down projections are stored; so many that are no padding.
        """
        super().__init__()
        self.kind, self.by_inputs = kind, neurons is not None
        for number, plane in enumerate(planes):
            self.register_buffer(f"plane{number}", plane, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self._planes, self._columns = len(planes), columns
        self._together = GROUP if kind == "records" else 1  # rows of the matrix in a row of a plane
        rows = neurons or len(planes[0])
        self.in_features, self.out_features = (rows, columns) if self.by_inputs else (columns, rows)

    def slices(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """(rows, their floats [rows, columns]) of the stored matrix, a few rows at a time."""
        planes: list[Tensor] = [getattr(self, f"plane{number}") for number in range(self._planes)]
        total = self.in_features if self.by_inputs else self.out_features
        step = max(1, SLICE_BYTES // (4 * self._columns * self._together))
        for start in range(0, len(planes[0]), step):
            floats = _READERS[self.kind](*(plane[start : start + step] for plane in planes))
            rows = slice(start * self._together, min((start + step) * self._together, total))
            yield rows, floats[: rows.stop - rows.start, : self._columns].to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [.., in] to [.., out], in autocast's type where it is on."""
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        out: Tensor = _PackedProduct.apply(x.flatten(0, -2), self)
        if isinstance(self.bias, Tensor):
            out = out + self.bias.to(out.dtype)
        return out.view(*x.shape[:-1], self.out_features)


class _PackedProduct(torch.autograd.Function):
    """x W^T for x [M, in]; the gradient of x is computed from the packed bytes again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: PackedLinear) -> Tensor:
        ctx.matrix = matrix
        return _product(x, matrix, along_rows=not matrix.by_inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _product(grad, ctx.matrix, along_rows=ctx.matrix.by_inputs), None


def _product(x: Tensor, matrix: PackedLinear, *, along_rows: bool) -> Tensor:
    """Multiply by the stored matrix S [rows, columns]: x S^T (one output per row), or x S (one per column)."""
    rows = matrix.out_features if not matrix.by_inputs else matrix.in_features
    columns = matrix.in_features if not matrix.by_inputs else matrix.out_features
    if along_rows:
        out = x.new_empty(len(x), rows)
        for part, floats in matrix.slices(x.dtype):
            out[:, part] = x @ floats.t()
        return out
    out = x.new_zeros(len(x), columns)
    for part, floats in matrix.slices(x.dtype):
        out.addmm_(x[:, part], floats)
    return out


class FrozenEmbedding(nn.Module):
    """Looks ids up in a table of its own type and returns the rows in `dtype`."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)
        self._dtype = dtype

    def forward(self, token_ids: Tensor) -> Tensor:
        """token_ids [..] -> [.., H]."""
        weight: Tensor = self.weight  # type: ignore[assignment]
        return F.embedding(token_ids, weight).to(self._dtype)


# -- the model -----------------------------------------------------------------------------------------------


def load_packed_model(directory: Path, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> PersimmonModel:
    """The model of a packed directory for training adapters on it: every weight frozen, every matrix packed.

    `dtype`: that of activations. On the CPU the packed bytes stay memory-mapped.
    Raises InputError for a format without a reader here, else as `open_packed`.
    """
    opened = open_packed(directory)
    if opened.form.name not in FORMATS:
        raise InputError(
            f"{directory} is {opened.form.name}; adapters train on {' or '.join(FORMATS)} (persimmon quantize)"
        )
    with torch.device("meta"):
        model = PersimmonModel(opened.config)

    def read(name: str) -> Tensor:
        return map_tensor(opened.tensors[name]).to(device)

    for name in [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, _packed(name, opened, read))
    model.embed_tokens = FrozenEmbedding(read("embed_tokens.weight"), dtype)  # type: ignore[assignment]
    norms = {name: read(name) for name, _ in model.named_parameters()}
    model.load_state_dict(norms, strict=True, assign=True)
    return model.requires_grad_(False).eval()


def _packed(name: str, opened: PackedDirectory, read: Any) -> PackedLinear:
    """One packed matrix of the model, by the name of its module."""
    config, form = opened.config, opened.form
    if name == "lm_head":
        return PackedLinear("planes", (read("lm_head.top"), read("lm_head.rest")), config.hidden_size, None)
    bias = read(f"{name}.bias")
    for kind, ending in (("int8", "neurons"), ("records", "records")):
        if f"{name}.{ending}" in opened.tensors:
            rows = (read(f"{name}.{ending}"),)
            return PackedLinear(kind, rows, config.hidden_size, bias, neurons=config.intermediate_size)
    kind = form.attention if ".self_attn." in name else form.mlp
    return PackedLinear(kind, (read(f"{name}.weight"),), config.hidden_size, bias)


def packed_bytes(model: PersimmonModel) -> int:
    """Bytes of everything frozen: packed matrices, embedding, biases and norms."""
    tensors = [*model.buffers(), *(p for p in model.parameters() if not p.requires_grad)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
