"""The packed layouts read back with numpy, slowly: what native/layout.h says, written a second time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from persimmon.fast.cpu import _native

ISAS = _native.supported_isas()
TILED_ISAS = [isa for isa in ISAS if _native.tiled_tokens(isa)]
EIGHT_ISAS = [isa for isa in ISAS if _native.fewest_eights(isa)]
"""Instruction sets with kernels for many tokens at once."""


def same_bits(kind: str) -> list[list[str]]:
    """Instruction sets in groups that give the same bits: AMX sums bfloat16 rows in an order of its own."""
    if kind != "bfloat16" or "amx" not in ISAS:
        return [ISAS]
    return [[isa for isa in ISAS if isa != "amx"], ["amx"]]


def lane_order(codes: np.ndarray) -> np.ndarray:
    """[R, K] in lane order -> plain order."""
    rows = codes.shape[0]
    lanes = codes.reshape(rows, -1, 8, 8, 4)  # superblock, vector v, group g, byte b
    return lanes.transpose(0, 1, 3, 2, 4).reshape(rows, -1)  # 32 g + 4 v + b


def nibbles(block: np.ndarray) -> np.ndarray:
    """[R, S, 128] bytes -> [R, 256 * S] codes in plain order."""
    return lane_order(np.concatenate([block & 15, block >> 4], axis=-1).reshape(block.shape[0], -1))


def scales(block: np.ndarray) -> np.ndarray:
    """[R, S, 16] bytes -> a float32 scale for every weight, [R, 256 * S]."""
    halves = np.ascontiguousarray(block).view(np.float16).astype(np.float32)
    return np.repeat(halves.reshape(block.shape[0], -1), 32, axis=1)


def blocks(rows: np.ndarray, size: int) -> np.ndarray:
    return rows.reshape(rows.shape[0], -1, size)


def unpack_q8(rows: np.ndarray) -> np.ndarray:
    b = blocks(rows, 272)
    return lane_order(b[..., :256].view(np.int8).reshape(rows.shape[0], -1)) * scales(b[..., 256:])


def unpack_q4(rows: np.ndarray) -> np.ndarray:
    b = blocks(rows, 144)
    return (nibbles(b[..., :128]).astype(np.float32) - 8) * scales(b[..., 128:])


def pairs(block: np.ndarray) -> np.ndarray:
    """[R, S, 64] bytes -> [R, 256 * S] codes of two bits in plain order."""
    cut = np.concatenate([block >> shift & 3 for shift in (0, 2, 4, 6)], axis=-1)
    return lane_order(cut.reshape(block.shape[0], -1))


@dataclass(frozen=True)
class Planes:
    """What the top and rest rows of R rows of S superblocks say, or should."""

    codes: np.ndarray
    """int32 [R, 256 S], -127 .. 127 in plain order."""
    scale_codes: np.ndarray
    """uint8 [R, 8 S]."""
    unit: np.ndarray
    """float32 [R], as the next two."""
    shift: np.ndarray
    error: np.ndarray

    @property
    def scales(self) -> np.ndarray:
        """Of every weight."""
        return np.repeat(self.unit[:, None] * self.scale_codes, 32, axis=1)

    @property
    def floats(self) -> np.ndarray:
        return self.codes.astype(np.float32) * self.scales

    @property
    def coarse(self) -> np.ndarray:
        """The weights by their top two bits alone."""
        return (64 * ((self.codes + 128) // 64) - 96.5).astype(np.float32) * self.scales


def top_bytes(columns: int) -> int:
    return -(-(72 * superblocks(columns) + 48) // 64) * 64


def read_planes(top: np.ndarray, rest: np.ndarray) -> Planes:
    rows, size = rest.shape[0], rest.shape[1] // 192
    assert top.shape == (rows, top_bytes(256 * size))
    r = blocks(rest, 192)
    low = 16 * pairs(r[..., :64]).astype(np.int32) + nibbles(r[..., 64:])
    facts = np.ascontiguousarray(top[:, 72 * size + 32 : 72 * size + 48]).view(np.float32)
    assert not facts[:, 3].any() and not top[:, 72 * size + 48 :].any(), "what has no meaning is zero"
    codes = 64 * pairs(blocks(top[:, : 64 * size], 64)).astype(np.int32) + low - 128
    return Planes(codes, top[:, 64 * size : 72 * size], facts[:, 0], facts[:, 1], facts[:, 2])


def round_planes(weights: np.ndarray, center: np.ndarray, importance: np.ndarray | None = None) -> Planes:
    """The rounding itself, a second time."""
    columns = weights.shape[1]
    w = padded(weights)
    groups = w.reshape(len(w), -1, 32)
    steps = np.abs(groups).max(-1) / np.float32(127)
    unit = np.full(len(w), 2.0**-24, np.float32)
    while (steps.max(1) / unit > 255).any():
        unit[steps.max(1) / unit > 255] *= 2
    scale_codes = np.ceil(steps / unit[:, None]).astype(np.uint8)
    scale = (unit[:, None] * scale_codes)[..., None]
    codes = np.rint(np.divide(groups, scale, out=np.zeros_like(groups), where=scale > 0)).astype(np.int32)
    rounded = Planes(codes.reshape(w.shape), scale_codes, unit, unit, unit)
    lost = (rounded.floats - rounded.coarse)[:, :columns].astype(np.float64)
    shift, error = lost @ center.astype(np.float64), np.sqrt(np.average(lost**2, axis=1, weights=importance))
    return Planes(rounded.codes, scale_codes, unit, shift.astype(np.float32), error.astype(np.float32))


def same_planes(found: Planes, expected: Planes) -> None:
    """Codes and scales to the bit; shift and error as far as float32 sums go."""
    for name in ("codes", "scale_codes", "unit"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), name)
    np.testing.assert_allclose(found.error, expected.error, rtol=1e-5, atol=0)
    # Rounding of a sum of many signs is relative to its parts, not to what is left of them.
    np.testing.assert_allclose(found.shift, expected.shift, rtol=1e-5, atol=1e-5 * np.abs(expected.shift).max())


def unpack_planes(top: np.ndarray, rest: np.ndarray) -> np.ndarray:
    return read_planes(top, rest).floats


def with_outliers(top: np.ndarray, columns: int, exact: np.ndarray) -> np.ndarray:
    """Top rows of so many columns with float16 weights [R, 16] of the outlier columns in their place."""
    filled, start = top.copy(), 72 * superblocks(columns)
    filled[:, start : start + 32] = np.ascontiguousarray(exact).view(np.uint8)
    return filled


def unpack_neurons(rows: np.ndarray) -> np.ndarray:
    b = blocks(rows, 272)
    return b[..., :256].view(np.int8).reshape(rows.shape[0], -1) * scales(b[..., 256:])


def unpack_records(records: np.ndarray) -> np.ndarray:
    """[R, bytes] -> [32 R neurons, outputs], byte by byte as layout.h says."""
    width = records.shape[1] // 18
    halves = np.ascontiguousarray(records[:, : 2 * width]).view(np.float16).astype(np.float32)
    rows = records[:, 2 * width :].reshape(-1, width // 2)
    output = np.arange(width)
    low = output % 64
    byte = rows[:, output // 128 * 64 + low % 16 // 4 * 16 + low // 16 * 4 + low % 4]
    codes = np.where(output % 128 < 64, byte & 15, byte >> 4).astype(np.float32) - 8
    return codes * np.repeat(halves, 32, axis=0)


def superblocks(size: int) -> int:
    return -(-size // 256)


def pack(kind: str, weights: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    out = np.empty((weights.shape[0], superblocks(weights.shape[1]) * {"q8": 272, "q4": 144}[kind]), np.uint8)
    _native.pack_rows(kind, weights, out, importance, 1)
    return out


def pack_planes(
    weights: np.ndarray, center: np.ndarray | None = None, importance: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    rows, columns = weights.shape
    top = np.full((rows, top_bytes(columns)), 255, np.uint8)
    rest = np.full((rows, 192 * superblocks(columns)), 255, np.uint8)
    _native.pack_planes(weights, np.zeros(columns, np.float32) if center is None else center, importance, top, rest, 1)
    return top, rest


def pack_neurons(weights: np.ndarray) -> np.ndarray:
    out = np.empty((weights.shape[0], superblocks(weights.shape[1]) * 272), np.uint8)
    _native.pack_neurons(weights, out, 0, 1)
    return out


def pack_records(weights: np.ndarray, slices: int = 1) -> np.ndarray:
    """A down projection [outputs, neurons], in so many calls."""
    outputs, neurons = weights.shape
    width = superblocks(outputs) * 256
    records = np.zeros((-(-neurons // 32), 18 * width), np.uint8)
    start = 0
    for part in np.array_split(weights, slices):
        _native.pack_int4_records(np.ascontiguousarray(part), start, width, records, 2)
        start += len(part)
    return records


def padded(matrix: np.ndarray) -> np.ndarray:
    return np.pad(matrix, ((0, 0), (0, -matrix.shape[1] % 256)))


def bfloat16(values: np.ndarray) -> np.ndarray:
    """Cut to bfloat16, as bit patterns."""
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


class RowMatrix:
    """A weight matrix in one format: what the kernel gets, and the floats that it stands for."""

    def __init__(self, kind: str, weights: np.ndarray) -> None:
        self.kind = kind
        self.rest = None
        columns = weights.shape[1]
        if kind in ("q8", "q4"):
            self.packed = pack(kind, weights)
            self.floats = (unpack_q8 if kind == "q8" else unpack_q4)(self.packed)[:, :columns]
        elif kind == "planes":
            self.packed, self.rest = pack_planes(weights)
            self.floats = unpack_planes(self.packed, self.rest)[:, :columns]
        elif kind == "bfloat16":
            self.packed = bfloat16(padded(weights)).view(np.uint8)
            self.floats = from_bfloat16(bfloat16(weights))
        else:
            self.packed, self.floats = padded(weights).view(np.uint8), weights

    def times(
        self, x: np.ndarray, isa: str, tiled: bool = False, panels: bool = False, eights: bool = False
    ) -> np.ndarray:
        return _native.rows(self.kind, self.packed, self.rest, x, isa, tiled, panels, eights)

    def expected(self, x: np.ndarray) -> np.ndarray:
        """In float64, with the inputs as the kernel sees them."""
        seen = x if self.kind in ("float32", "bfloat16") else _native.round_trip(x)
        return seen.astype(np.float64) @ self.floats.astype(np.float64).T
