"""The MLP that skips zeros against a plain one, in every format, instruction set and order of work."""

from __future__ import annotations

import numpy as np
import pytest

from packed_layouts import (
    EIGHT_ISAS,
    ISAS,
    TILED_ISAS,
    bfloat16,
    from_bfloat16,
    pack,
    pack_neurons,
    pack_planes,
    pack_records,
    padded,
    read_planes,
    same_bits,
    unpack_neurons,
    unpack_q4,
    unpack_q8,
    unpack_records,
    with_outliers,
)
from persimmon.fast.cpu import _native

FORMATS = ("float32", "bfloat16", "q8", "q4", "planes")
TOLERANCE = 1e-5  # of the largest output


class Mlp:
    """Weights in one format, and as floats."""

    def __init__(self, kind: str, hidden: int, neurons: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.kind, self.hidden = kind, hidden
        up = rng.standard_normal((neurons, hidden), np.float32) * 0.05
        down = rng.standard_normal((neurons, hidden), np.float32) * 0.05
        self.bias = rng.standard_normal(neurons).astype(np.float32) * 0.1 - 1.0
        self.columns = np.sort(rng.choice(hidden, 16, replace=False))
        self.offset, self.center = 0, None
        if kind == "planes":
            self.center = rng.standard_normal(hidden).astype(np.float32)
            self.center[self.columns] = 0.0
            self._pack_planes(up, down)
        elif kind == "q8":
            self.up, self.down = pack("q8", up), pack_neurons(down)
            self.up_floats, self.down_floats = unpack_q8(self.up), unpack_neurons(self.down)
        elif kind == "q4":
            self.up, self.down = pack("q4", up), pack_records(np.ascontiguousarray(down.T))
            self.up_floats, self.down_floats = unpack_q4(self.up), unpack_records(self.down)[:neurons]
        elif kind == "bfloat16":
            self.up, self.down = bfloat16(padded(up)).view(np.uint8), bfloat16(padded(down)).view(np.uint8)
            self.up_floats, self.down_floats = (
                from_bfloat16(bfloat16(padded(up))),
                from_bfloat16(bfloat16(padded(down))),
            )
        else:
            self.up, self.down = padded(up).view(np.uint8), padded(down).view(np.uint8)
            self.up_floats, self.down_floats = padded(up), padded(down)

    def _pack_planes(self, up: np.ndarray, down: np.ndarray) -> None:
        exact = np.ascontiguousarray(up[:, self.columns]).astype(np.float16)
        up[:, self.columns] = 0.0
        top, rest = pack_planes(up, self.center)
        rows = pack_neurons(down)
        self.up = with_outliers(top, self.hidden, exact)
        self.down = np.concatenate([rest, rows], axis=1)
        self.offset = rest.shape[1]
        self.planes = read_planes(top, rest)
        self.up_floats, self.down_floats = self.planes.floats, unpack_neurons(rows)
        self.up_floats[:, self.columns] = exact.astype(np.float32)

    def run(
        self,
        x: np.ndarray,
        margin: float = np.inf,
        together: bool = False,
        isa: str = "auto",
        tiled: bool = False,
        panels: bool = False,
        eights: bool = False,
        sketched: bool = False,
    ) -> tuple[np.ndarray, int, int]:
        outliers = np.zeros((len(x), 16), np.float32)
        if self.kind == "planes":
            outliers = np.ascontiguousarray(x[:, self.columns])
            x = x.copy()
            x[:, self.columns] = 0.0
        y, candidates, active = _native.sparse_mlp(
            self.kind,
            self.up,
            self.down,
            self.offset,
            self.bias,
            x,
            outliers,
            margin,
            self.center,
            together,
            isa,
            tiled,
            panels,
            eights,
            sketched,
        )
        return y[:, : self.hidden], candidates, active

    def pre_activations(self, x: np.ndarray) -> np.ndarray:
        seen = x.copy()
        if self.kind in ("q8", "q4", "planes"):
            if self.kind == "planes":
                seen[:, self.columns] = 0.0
            seen = _native.round_trip(seen)
            if self.kind == "planes":
                seen[:, self.columns] = x[:, self.columns]
        return seen.astype(np.float64) @ self.up_floats[:, : self.hidden].T.astype(np.float64) + self.bias

    def certainty(self, x: np.ndarray) -> np.ndarray:
        """By how many deviations of its error the estimate of a neuron lies above zero."""
        rest = x.astype(np.float64)
        rest[:, self.columns] = 0.0
        seen = _native.round_trip(rest.astype(np.float32)).astype(np.float64)
        estimate = seen @ self.planes.coarse[:, : self.hidden].T.astype(np.float64) + self.planes.shift + self.bias
        estimate += x[:, self.columns].astype(np.float64) @ self.up_floats[:, self.columns].T
        return estimate / (self.planes.error * np.linalg.norm(rest - self.center, axis=1)[:, None])

    def expected(self, x: np.ndarray, margin: float = np.inf) -> np.ndarray:
        squared = np.maximum(self.pre_activations(x), 0) ** 2
        if margin < np.inf:
            squared *= self.certainty(x) > -margin
        if self.kind == "q4":  # rounds them as well, which takes the very same numbers: ties must fall alike
            pre = _native.rows("q4", self.up, None, x) + self.bias
            squared = _native.round_trip(np.maximum(pre, 0) ** 2).astype(np.float64)
        return squared @ self.down_floats[:, : self.hidden].astype(np.float64)


def inputs(tokens: int, hidden: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((tokens, hidden), np.float32)


def check(mlp: Mlp, x: np.ndarray) -> None:
    """Instruction sets, one token at a time and together, give the same bits, and the right numbers."""
    expected = mlp.expected(x)
    for isas in same_bits(mlp.kind):
        first = mlp.run(x, isa=isas[0])[0]
        assert np.max(np.abs(first - expected)) <= TOLERANCE * (np.abs(expected).max() + 1e-6)
        for isa in isas:
            for together in (False, True):
                assert np.array_equal(mlp.run(x, together=together, isa=isa)[0], first), (isa, together)
            if mlp.kind in ("float32", "bfloat16"):
                assert np.array_equal(mlp.run(x, together=True, isa=isa, panels=True)[0], first), isa
                y, candidates, active = mlp.run(x, isa=isa, sketched=True)
                assert np.array_equal(y, first) and mlp.run(x, isa=isa)[2] == active <= candidates, isa
            elif isa in TILED_ISAS:
                assert np.array_equal(mlp.run(x, together=True, isa=isa, tiled=True)[0], first), isa
            if isa in EIGHT_ISAS and mlp.kind in ("q8", "planes") and len(x) <= 8:
                assert np.array_equal(mlp.run(x, together=True, isa=isa, eights=True)[0], first), isa


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(
    ("hidden", "neurons", "tokens"),
    [
        (16, 1, 1),
        (300, 600, 5),
        (256, 257, 3),
        (64, 255, 9),
        (520, 1024, 4),
        (2304, 300, 8),
        (256, 300, 40),
        (4352, 40, 2),
    ],
)
def test_equals_the_plain_mlp(kind: str, hidden: int, neurons: int, tokens: int) -> None:
    check(Mlp(kind, hidden, neurons), inputs(tokens, hidden))


@pytest.mark.parametrize("kind", FORMATS)
def test_no_neuron_active(kind: str) -> None:
    mlp = Mlp(kind, 128, 300)
    mlp.bias[:] = -1e6
    y, _, active = mlp.run(inputs(2, 128))
    assert active == 0 and not y.any()
    check(mlp, inputs(2, 128))


@pytest.mark.parametrize("kind", FORMATS)
def test_every_neuron_active(kind: str) -> None:
    mlp = Mlp(kind, 128, 600)
    mlp.bias[:] = 50.0
    assert mlp.run(inputs(3, 128))[2] == 3 * 600
    check(mlp, inputs(3, 128))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("neuron", [0, 63, 255, 256, 599])
def test_one_neuron_active(kind: str, neuron: int) -> None:
    mlp = Mlp(kind, 128, 600)
    mlp.bias[:] = -1e6
    mlp.bias[neuron] = 10.0
    assert mlp.run(inputs(1, 128))[2] == 1
    check(mlp, inputs(1, 128))


@pytest.mark.parametrize("kind", FORMATS)
def test_extreme_inputs(kind: str) -> None:
    mlp = Mlp(kind, 256, 512)
    x = inputs(4, 256)
    x[0] = 0.0
    x[1, int(mlp.columns[0])] = 1e4
    x[2, 7] = -1e4
    x[3] *= 1e-20
    check(mlp, x)


@pytest.mark.parametrize("isa", ISAS)
def test_q4_counts_what_it_reads(isa: str) -> None:
    """Neurons that are not zero once rounded, and the groups of 32 that hold them; the same alone and together."""
    mlp, x = Mlp("q4", 256, 600), inputs(5, 256)
    mlp.bias[320:352] = -1e6  # a whole group is silent
    squared = np.maximum(_native.rows("q4", mlp.up, None, x) + mlp.bias, 0) ** 2
    active = np.count_nonzero(_native.round_trip(squared))
    assert 0 < active < np.count_nonzero(squared)  # small ones are rounded to zero beside large ones
    for together in (False, True):
        assert mlp.run(x, together=together, isa=isa)[1:] == (5 * 600, active)


@pytest.mark.parametrize("isa", ISAS)
def test_q4_takes_the_largest_sums(isa: str) -> None:
    """Codes of 127 against nibbles of 0 and 15 in all 32 neurons of a group: 16 bits hold them, but not much more."""
    weights = np.full((256, 64), 7.0, np.float32)
    weights[:, ::32] = weights[::2] = -8.0  # which makes the scale 1
    mlp, x = Mlp("q4", 256, 64), np.zeros((1, 256), np.float32)
    mlp.bias[:] = 3.0
    mlp.down = pack_records(weights)
    mlp.down_floats = unpack_records(mlp.down)[:64]
    np.testing.assert_allclose(mlp.down_floats, weights.T, rtol=1e-3)
    for together in (False, True):
        np.testing.assert_allclose(mlp.run(x, together=together, isa=isa)[0], mlp.expected(x), rtol=1e-6)
    check(mlp, inputs(3, 256))


def test_no_margin_gives_the_exact_mlp_and_reads_everything() -> None:
    mlp, x = Mlp("planes", 300, 1024), inputs(3, 300)
    _, candidates, _ = mlp.run(x, margin=np.inf)
    assert candidates == 3 * 1024


@pytest.mark.parametrize("margin", [-1.0, 0.0, 0.5, 1.0, 2.0, 3.0])
def test_a_margin_keeps_whose_estimates_are_above_it(margin: float) -> None:
    """Estimate, shift and error as the top rows have them, inputs around a center that is not zero."""
    mlp = Mlp("planes", 520, 1500)
    x = inputs(6, 520) + mlp.center
    x[0] = 0.0
    certainty = mlp.certainty(x)
    surely, perhaps = (np.count_nonzero(certainty > -margin + slack) for slack in (1e-4, -1e-4))
    assert surely > 0 and perhaps < 6 * 1500 and perhaps - surely < 5
    for isa in ISAS:
        for together in (False, True):
            y, candidates, active = mlp.run(x, margin, together, isa)
            assert surely <= candidates <= perhaps and active <= candidates
            if surely == perhaps:
                expected = mlp.expected(x, margin)
                assert np.max(np.abs(y - expected)) <= TOLERANCE * np.abs(expected).max()


@pytest.mark.parametrize("margin", [0.0, 1.0, 2.0, 3.0])
def test_a_margin_misses_only_the_smallest(margin: float) -> None:
    """Skipped neurons are within a few standard deviations of zero, and kept ones have exactly their values."""
    mlp = Mlp("planes", 1024, 4096)
    x = inputs(8, 1024) + mlp.center
    exact, _, all_active = mlp.run(x, margin=np.inf)
    for isa in ISAS:
        for together in (False, True):
            y, candidates, active = mlp.run(x, margin, together, isa)
            error = np.linalg.norm(y - exact) / np.linalg.norm(exact)
            missed = 1 - active / all_active
            # A normal residual misses these shares of the positives; the smallest ones, so the output barely moves.
            assert missed < {0.0: 0.15, 1.0: 0.03, 2.0: 0.005, 3.0: 0.0005}[margin]
            assert error < {0.0: 0.05, 1.0: 0.01, 2.0: 0.002, 3.0: 0.0001}[margin]
            assert active <= candidates < 8 * 4096 * (0.35 + 0.1 * margin)


@pytest.mark.parametrize("isa", EIGHT_ISAS)
@pytest.mark.parametrize(("neurons", "tokens"), [(300, 3), (97, 8), (512, 5)])
@pytest.mark.parametrize("margin", [-3.0, 0.0, 2.0, np.inf])
def test_few_tokens_skip_what_one_skips(isa: str, margin: float, neurons: int, tokens: int) -> None:
    mlp, x = Mlp("planes", 512, neurons), inputs(tokens, 512)
    one, together = mlp.run(x, margin, isa=ISAS[0]), mlp.run(x, margin, True, isa, eights=True)
    assert np.array_equal(together[0], one[0]) and together[1:] == one[1:]


@pytest.mark.parametrize("isa", TILED_ISAS)
@pytest.mark.parametrize("margin", [-3.0, 0.0, 2.0, np.inf])
@pytest.mark.parametrize(("neurons", "tokens"), [(600, 5), (257, 16), (1024, 37)])
def test_many_tokens_skip_what_one_skips(isa: str, margin: float, neurons: int, tokens: int) -> None:
    """Candidates, active neurons and outputs; few candidates (a negative margin) and all take different paths."""
    mlp, x = Mlp("planes", 520, neurons), inputs(tokens, 520)
    x[0] = 0.0
    x[1] *= 1e4
    one, together = mlp.run(x, margin, isa=ISAS[0]), mlp.run(x, margin, True, isa, tiled=True)
    assert np.array_equal(one[0], together[0])
    assert one[1:] == together[1:]


def test_the_spread_is_calibrated() -> None:
    """What the top bits leave out has the deviation that their rows name, and as many neurons lie in each interval.

    With a center: the same inputs around zero, for which the rows are not made, lie farther from their estimates.
    """
    mlp = Mlp("planes", 1024, 8192)
    noise = inputs(4, 1024)
    x = noise + mlp.center
    rest = x.copy()
    rest[:, mlp.columns] = 0.0
    deviation = mlp.planes.error * np.linalg.norm(rest - mlp.center, axis=1)[:, None]
    found = mlp.pre_activations(x) / deviation - mlp.certainty(x)
    assert abs(found.mean()) < 0.05 and 0.95 < found.std() < 1.05
    counts = [mlp.run(x, margin)[1] for margin in (0.0, 1.0, 2.0)]
    expected = [np.count_nonzero(mlp.certainty(x) > -margin) for margin in (0.0, 1.0, 2.0)]
    assert counts == pytest.approx(expected, abs=2)
