"""Document masks: packed documents neither see nor change each other, forward and backward."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from persimmon.errors import InputError
from persimmon.model import check_boundaries, document_positions
from tiny_model import tiny_ids, tiny_model


@st.composite
def packed_rows(draw: st.DrawFn) -> tuple[int, int, list[int]]:
    """Rows, their length, and document boundaries that cross no row."""
    rows, length = draw(st.integers(1, 3)), draw(st.integers(1, 24))
    boundaries = [0]
    for row in range(rows):
        cuts = draw(st.sets(st.integers(1, length - 1))) if length > 1 else set()
        boundaries += [row * length + cut for cut in (*sorted(cuts), length)]
    return rows, length, boundaries


@settings(deadline=None, max_examples=40)
@given(packed=packed_rows(), data=st.data())
def test_a_document_is_blind_to_the_others(packed: tuple[int, int, list[int]], data: st.DataObject) -> None:
    rows, length, boundaries = packed
    model = tiny_model()
    ids = tiny_ids(model.config, rows, length)
    chosen = data.draw(st.integers(0, len(boundaries) - 2))
    start, end = boundaries[chosen : chosen + 2]
    changed = ids.flatten().clone()
    changed[start:end] = (changed[start:end] + 1 + chosen % 300) % model.config.vocab_size
    before = model.features(ids, documents=boundaries).flatten(0, 1)
    after = model.features(changed.view(rows, length), documents=boundaries).flatten(0, 1)
    others = torch.ones(rows * length, dtype=torch.bool)
    others[start:end] = False
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before[start:end], after[start:end])


@settings(deadline=None, max_examples=40)
@given(packed=packed_rows(), precision=st.sampled_from(["float32", "bfloat16"]))
def test_packed_documents_equal_each_one_alone(packed: tuple[int, int, list[int]], precision: str) -> None:
    rows, length, boundaries = packed
    model = tiny_model(rotary_precision=precision)
    ids = tiny_ids(model.config, rows, length)
    positions = document_positions(boundaries, rows, length)
    together = model.features(ids, documents=boundaries, positions=positions).flatten(0, 1)
    alone = [model.features(ids.flatten()[a:b][None])[0] for a, b in pairwise(boundaries)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=0)


@settings(deadline=None, max_examples=15)
@given(packed=packed_rows())
def test_packed_gradients_equal_the_sum_over_documents(packed: tuple[int, int, list[int]]) -> None:
    rows, length, boundaries = packed
    model = tiny_model().to(torch.float64)
    ids = tiny_ids(model.config, rows, length)
    positions = document_positions(boundaries, rows, length)
    model.features(ids, documents=boundaries, positions=positions).square().sum().backward()
    packed_gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for a, b in pairwise(boundaries):
        model.features(ids.flatten()[a:b][None]).square().sum().backward()
    for name, expected in packed_gradients.items():
        torch.testing.assert_close(model.get_parameter(name).grad, expected, atol=1e-9, rtol=1e-9)


def test_no_gradient_reaches_another_document() -> None:
    model = tiny_model()
    embedded: list[Tensor] = []

    def keep(module: torch.nn.Module, arguments: Any, output: Tensor) -> None:
        output.retain_grad()
        embedded.append(output)

    model.embed_tokens.register_forward_hook(keep)
    features = model.features(tiny_ids(model.config, 1, 20), documents=[0, 6, 13, 20])
    features[0, 6:13].square().sum().backward()
    gradient = embedded[0].grad
    assert gradient is not None
    touched = gradient[0].abs().sum(1) > 0
    assert touched.tolist() == [6 <= t < 13 for t in range(20)]


def test_one_document_per_row_is_the_default() -> None:
    model = tiny_model()
    ids = tiny_ids(model.config, 3, 11)
    assert torch.equal(model(ids, documents=[0, 11, 22, 33]), model(ids))


def test_document_positions_start_anew() -> None:
    found = document_positions([0, 3, 5, 7, 10], 2, 5)
    assert found.tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]


def test_bfloat16_positions_deep_in_a_row_are_coarse() -> None:
    """Why `document_positions` exists: the same document at 4,096 and at 0 of its row is not the same."""
    model = tiny_model(rotary_precision="bfloat16")
    ids = tiny_ids(model.config, 1, 20)
    start = model(ids)
    deep = model(ids, positions=4096 + torch.arange(20))
    assert float((start - deep).detach().abs().max()) > 0.1


@pytest.mark.parametrize(
    ("boundaries", "message"),
    [
        ([], "from 0 to 12"),
        ([0], "from 0 to 12"),
        ([1, 6, 12], "from 0 to 12"),
        ([0, 6, 11], "from 0 to 12"),
        ([0, 6, 6, 12], "ascend, got 6 and then 6"),
        ([0, 8, 6, 12], "crosses the end of a row|ascend"),
        ([0, 5, 7, 12], r"\[5, 7\) crosses the end of a row of 6"),
        ([0, 12], r"\[0, 12\) crosses"),
    ],
)
def test_wrong_boundaries_are_refused(boundaries: list[int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_boundaries(boundaries, 2, 6)
    model = tiny_model()
    with pytest.raises(InputError, match=message):
        model.features(tiny_ids(model.config, 2, 6), documents=boundaries)
