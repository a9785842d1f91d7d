"""Dense products of every format and instruction set against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest

from packed_layouts import EIGHT_ISAS, ISAS, TILED_ISAS, RowMatrix, pack_planes, read_planes, same_bits
from persimmon.fast.cpu import _native

PACKED = ("q8", "q4", "planes")
FORMATS = ("float32", "bfloat16", *PACKED)

# float32 sums of up to 1024 products or 32 group sums per lane, relative to the sum of magnitudes.
TOLERANCE = 2e-6


def case(rows: int, columns: int, tokens: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((rows, columns), np.float32) * 0.02, rng.standard_normal((tokens, columns), np.float32)


def check(matrix: RowMatrix, x: np.ndarray) -> None:
    scale = np.abs(x) @ np.abs(matrix.floats).T + 1e-30
    for isas in same_bits(matrix.kind):
        results = [matrix.times(x, isa) for isa in isas]
        if matrix.kind in PACKED:
            results += [matrix.times(x, isa, tiled=True) for isa in isas if isa in TILED_ISAS]
        else:
            results += [matrix.times(x, isa, panels=True) for isa in isas]
        assert np.max(np.abs(results[0] - matrix.expected(x)) / scale) < TOLERANCE
        for result in results[1:]:
            assert np.array_equal(result, results[0])


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(
    ("rows", "columns", "tokens"),
    [(1, 1, 1), (3, 256, 2), (17, 300, 4), (9, 1000, 7), (33, 512, 9), (32, 256, 16), (50, 300, 33), (16, 512, 81)],
)
def test_equals_the_product(kind: str, rows: int, columns: int, tokens: int) -> None:
    w, x = case(rows, columns, tokens)
    check(RowMatrix(kind, w), x)


@pytest.mark.parametrize("kind", FORMATS)
def test_adversarial_inputs(kind: str) -> None:
    w, x = case(8, 512, 5)
    x[0] = 0.0
    x[1] = 1e-30
    x[2, 100] = 1e6  # an outlier a million times the rest
    x[3] = np.where(np.arange(512) % 2, 1.0, -1.0)
    w[0] = 0.0
    w[1] = np.sign(w[1])  # extreme codes everywhere
    w[2, 5] = 100.0
    check(RowMatrix(kind, w), x)


@pytest.mark.parametrize("kind", ["q8", "q4", "planes"])
def test_largest_codes_do_not_overflow(kind: str) -> None:
    """Every weight and every input at the end of its range, with every combination of signs."""
    w = np.stack([np.full(256, 1.0), np.full(256, -1.0)]).astype(np.float32)
    x = np.stack([np.full(256, 3.0), np.full(256, -3.0)]).astype(np.float32)
    matrix = RowMatrix(kind, w)
    runs = [matrix.times(x, isa) for isa in ISAS] + [matrix.times(x, isa, tiled=True) for isa in TILED_ISAS]
    for result in runs:
        np.testing.assert_allclose(result, [[768, -768], [-768, 768]], rtol=2e-3 if kind != "q4" else 0.02)


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("isa", TILED_ISAS)
@pytest.mark.parametrize(
    ("rows", "columns", "tokens"),
    [(1, 256, 17), (16, 31, 16), (65, 300, 33), (64, 1024, 40), (130, 600, 21), (15, 4096, 4), (80, 256, 257)],
)
def test_many_tokens_have_the_bits_of_one(kind: str, isa: str, rows: int, columns: int, tokens: int) -> None:
    """Every remainder of panels (16 rows, four at once) and of tiles (16 tokens, 8 and 4 of the last)."""
    w, x = case(rows, columns, tokens, seed=rows)
    x[0] = 0.0
    x[tokens // 2] *= 1e5
    matrix = RowMatrix(kind, w)
    assert np.array_equal(matrix.times(x, isa, tiled=True), matrix.times(x, ISAS[0]))


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("isa", EIGHT_ISAS)
@pytest.mark.parametrize(
    ("rows", "columns", "tokens"),
    [(1, 256, 1), (16, 31, 2), (33, 300, 3), (64, 1024, 4), (130, 600, 5), (15, 4096, 8), (97, 512, 7)],
)
def test_few_tokens_have_the_bits_of_one(kind: str, isa: str, rows: int, columns: int, tokens: int) -> None:
    """Every remainder of a panel of 32 rows, one to eight tokens, extreme inputs among them."""
    w, x = case(rows, columns, tokens, seed=rows + tokens)
    x[0] = 0.0
    x[tokens // 2] *= 1e5
    matrix = RowMatrix(kind, w)
    assert np.array_equal(matrix.times(x, isa, eights=True), matrix.times(x, ISAS[0]))


def head_case(rows: int, columns: int, tokens: int) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray, np.ndarray]:
    """Top and rest rows, inputs around a center that is far from zero, and the center."""
    w, x = case(rows, columns, tokens, seed=columns + tokens)
    center = np.random.default_rng(columns).standard_normal(columns, np.float32) * 2
    return pack_planes(w, center), x + center, center


@pytest.mark.parametrize("isa", EIGHT_ISAS)
@pytest.mark.parametrize("tokens", [1, 3, 8])
def test_the_heads_estimates_of_few_tokens(isa: str, tokens: int) -> None:
    head, x, center = head_case(70, 1024, tokens)
    expected = _native.head_rows(*head, x, center, 6.0, ISAS[0])
    for first, other in zip(expected, _native.head_rows(*head, x, center, 6.0, isa, eights=True), strict=True):
        assert np.array_equal(first, other)


def test_kernels_for_few_tokens_are_refused_where_there_are_none() -> None:
    w, x = case(1, 256, 9)
    for kind, isa in (("q8", "portable"), ("q8", ISAS[-1]), ("float32", ISAS[-1])):
        with pytest.raises(ValueError, match="no kernels for few tokens"):
            RowMatrix(kind, w).times(x, isa, eights=True)


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("rows", [1, 15, 31, 129])
@pytest.mark.parametrize("columns", [31, 256, 700, 1300])
def test_every_number_of_tokens_has_the_bits_of_one(kind: str, isa: str, rows: int, columns: int) -> None:
    """Every rest of a panel of 32 tokens, alone and behind full ones, and 300; rows cut by inputs too."""
    w, x = case(rows, columns, 300, seed=rows + columns)
    x[1] *= 1e20
    x[2] *= 1e-20
    matrix = RowMatrix(kind, w)
    alone = np.concatenate([matrix.times(x[t : t + 1], isa) for t in range(300)])
    error = np.abs(alone - matrix.expected(x)) / (np.abs(x) @ np.abs(matrix.floats).T)
    assert error.max() < TOLERANCE
    for tokens in (*range(1, 34), 43, 64, 70, 300):
        assert np.array_equal(matrix.times(x[:tokens], isa, panels=True), alone[:tokens]), tokens


@pytest.mark.parametrize("isa", ISAS)
def test_bfloat16_rows_keep_every_bit_of_float32_inputs(isa: str) -> None:
    """One weight a row, a power of two: the products are exact, from the largest inputs to those near the smallest."""
    rng = np.random.default_rng(5)
    x = (rng.uniform(1, 2, (40, 256)) * 2.0 ** rng.integers(-90, 120, (40, 256))).astype(np.float32)
    x *= rng.choice(np.float32([-1, 1]), x.shape)
    matrix = RowMatrix("bfloat16", np.diag(2.0 ** rng.integers(-8, 8, 256)).astype(np.float32))
    assert np.array_equal(matrix.times(x, isa), x * np.diag(matrix.floats))


@pytest.mark.parametrize("isa", ISAS)
def test_bfloat16_rows_err_no_more_than_float32_sums(isa: str) -> None:
    """Against float64, in units of the last place of the sum of magnitudes; vectors of 16 lanes are the yardstick."""
    w, x = case(96, 2048, 40, seed=7)
    matrix = RowMatrix("bfloat16", w)
    scale = np.abs(x) @ np.abs(matrix.floats).T
    error, yardstick = (
        np.sqrt(np.mean(((matrix.times(x, name) - matrix.expected(x)) / scale) ** 2)) for name in (isa, ISAS[0])
    )
    assert error < 1.2 * yardstick


@pytest.mark.parametrize("isa", ISAS)
def test_one_bad_token_spoils_no_other(isa: str) -> None:
    w, x = case(33, 300, 40)
    clean = RowMatrix("bfloat16", w).times(x, isa)
    x[3], x[20] = np.nan, np.inf
    spoilt = RowMatrix("bfloat16", w).times(x, isa)
    rest = np.delete(np.arange(40), [3, 20])
    assert np.array_equal(spoilt[rest], clean[rest])
    assert not np.isfinite(spoilt[[3, 20]]).any()


@pytest.mark.parametrize(("rows", "columns", "tokens"), [(1, 256, 1), (33, 300, 5), (70, 1024, 17)])
def test_the_heads_two_passes(rows: int, columns: int, tokens: int) -> None:
    """Estimates and bounds are what the top rows say, refined rows the full product to the last bit."""
    head, x, center = head_case(rows, columns, tokens)
    estimates, bounds, exact = _native.head_rows(*head, x, center, 6.0, ISAS[0])
    assert np.array_equal(exact, _native.rows("planes", *head, x, ISAS[0]))
    read = read_planes(*head)
    seen = _native.round_trip(x).astype(np.float64)
    expected = seen @ read.coarse[:, :columns].T.astype(np.float64) + read.shift
    scale = np.abs(seen) @ np.abs(read.coarse[:, :columns]).T + np.abs(read.shift)
    assert np.max(np.abs(estimates - expected) / scale) < TOLERANCE
    deviation = read.error * np.linalg.norm(x.astype(np.float64) - center, axis=1)[:, None]
    np.testing.assert_allclose(bounds - estimates, 6.0 * deviation, rtol=1e-3, atol=2e-6 * scale.max())
    assert np.abs((exact - estimates) / deviation).max() < 5.0  # of a normal distribution
    assert np.all(bounds >= exact) and np.all(bounds > estimates)
    for isa, tiled in [(isa, False) for isa in ISAS] + [(isa, True) for isa in TILED_ISAS]:
        for first, other in zip(
            (estimates, bounds, exact), _native.head_rows(*head, x, center, 6.0, isa, tiled), strict=True
        ):
            assert np.array_equal(first, other), (isa, tiled)


def test_tiles_are_refused_where_there_are_none() -> None:
    w, x = case(1, 256, 1)
    with pytest.raises(ValueError, match="no tiled kernels"):
        RowMatrix("q8", w).times(x, "portable", tiled=True)
    with pytest.raises(ValueError, match="no tiled kernels"):
        RowMatrix("float32", w).times(x, ISAS[-1], tiled=True)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_token_does_not_depend_on_the_others(kind: str) -> None:
    w, x = case(20, 600, 11)
    matrix = RowMatrix(kind, w)
    together = matrix.times(x, ISAS[-1])
    for t in range(11):
        assert np.array_equal(matrix.times(x[t : t + 1], ISAS[-1])[0], together[t])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("isa", ISAS)
def test_inputs_that_are_not_finite_are_refused(isa: str, bad: float) -> None:
    w, x = case(2, 300, 3)
    x[1, 299] = bad
    with pytest.raises(ValueError, match="not finite"):
        RowMatrix("q8", w).times(x, isa)


@pytest.mark.parametrize("isa", ISAS)
def test_inputs_round_to_the_nearest_code(isa: str) -> None:
    _, x = case(1, 777, 3)
    x[2, :32] = 0.0
    rounded = _native.round_trip(x, isa)
    step = np.repeat(np.abs(np.pad(x, ((0, 0), (0, 23))).reshape(3, -1, 32)).max(-1) / 127, 32, axis=1)[:, :777]
    assert np.all(np.abs(rounded - x) <= step * 0.5001)
    assert not rounded[2, :32].any()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("size", [1, 7, 8, 33, 4096])
def test_layer_norm(isa: str, size: int) -> None:
    rng = np.random.default_rng(size)
    x, weight, bias = (rng.standard_normal(size, np.float32) for _ in range(3))
    x += 100.0
    wide = x.astype(np.float64)
    expected = (wide - wide.mean()) / np.sqrt(wide.var() + 1e-5) * weight + bias
    result = _native.layer_norm(x, weight, bias, 1e-5, isa)
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=3e-4)  # 100 + x keeps 17 bits of x
    assert np.array_equal(result, _native.layer_norm(x, weight, bias, 1e-5, ISAS[0]))


def test_unknown_instruction_sets_are_refused() -> None:
    w, x = case(1, 256, 1)
    with pytest.raises(ValueError, match="'sse9' is not supported here; there are: portable"):
        RowMatrix("q8", w).times(x, "sse9")
