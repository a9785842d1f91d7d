"""Perplexity, divergence and agreement against plain torch."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from persimmon.errors import InputError
from persimmon.fast.cpu.fidelity import WINDOW, compare
from persimmon.infer.reference import ReferenceDecoder
from tiny_model import tiny_ids, tiny_model


def test_a_model_equals_itself() -> None:
    decoder = ReferenceDecoder(tiny_model())
    found = compare(decoder, decoder, tiny_ids(decoder.config, 1, 40)[0].tolist())
    assert (found.tokens, found.kl, found.top1_agreement, found.perplexity_change) == (39, 0.0, 1.0, 0.0)


@torch.inference_mode()
def test_measures_equal_torchs_over_windows() -> None:
    source, model = tiny_model(0), tiny_model(1)
    ids = tiny_ids(source.config, 1, WINDOW + 100)[0]
    seen: list[int] = []
    found = compare(
        ReferenceDecoder(source), ReferenceDecoder(model), ids.tolist(), lambda done, total: seen.append(done)
    )
    pieces = [ids[: WINDOW + 1], ids[WINDOW:]]
    p, q = (
        torch.cat([F.log_softmax(m(piece[None, :-1])[0].double(), -1) for piece in pieces]) for m in (source, model)
    )
    targets = torch.cat([piece[1:] for piece in pieces])
    assert found.tokens == len(targets) == seen[-1]
    assert found.source_perplexity == pytest.approx(math.exp(F.nll_loss(p, targets)), rel=1e-4)
    assert found.perplexity == pytest.approx(math.exp(F.nll_loss(q, targets)), rel=1e-4)
    assert found.kl == pytest.approx(float(F.kl_div(q, p, log_target=True, reduction="sum")) / len(targets), rel=1e-4)
    assert found.top1_agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))


def test_what_cannot_be_compared_is_refused() -> None:
    decoder = ReferenceDecoder(tiny_model())
    with pytest.raises(InputError, match="2 tokens or more, got 1"):
        compare(decoder, decoder, [1])
    with pytest.raises(InputError, match="vocabularies differ: 320 and 400"):
        compare(decoder, ReferenceDecoder(tiny_model(vocab_size=400)), [1, 2, 3])
