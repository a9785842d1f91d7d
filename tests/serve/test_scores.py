"""`persimmon eval --url` against the server scores as in-process evaluation does."""

from __future__ import annotations

from functools import partial

import pytest

for package in ("fastapi", "uvicorn", "prometheus_client", "httpx"):
    pytest.importorskip(package)

from persimmon.evals.language_model import DecoderLanguageModel  # noqa: E402
from persimmon.evals.server_model import ServerLanguageModel  # noqa: E402
from persimmon.evals.tasks.task import Likelihood, Measure, Score, TokenLikelihoods  # noqa: E402
from persimmon.infer.reference import ReferenceDecoder  # noqa: E402
from served import CONTEXT, build_engine, running  # noqa: E402
from tiny_model import tiny_model  # noqa: E402
from tiny_tokenizer import tiny_tokenizer  # noqa: E402

NON_ASCII = [
    Score("the story", " of light"), Score("the 日本語 story", " of 東京 light"), Score("“é” – ñ 🙂 the", " story"),
    Score("日本", "語"), Score("a🙂", "🙂🙂 b"), Score("", "日本 a"), Score("the ", "story"),
]  # fmt: skip


@pytest.mark.parametrize("normalizer", [{}, {"add_dummy_prefix": True, "remove_extra_whitespaces": True}])
def test_scores_by_the_server_equal_those_in_process(normalizer: dict[str, bool]) -> None:
    """Characters that are spelled in several byte tokens too."""
    tokenizer = tiny_tokenizer(**normalizer)
    model = DecoderLanguageModel(ReferenceDecoder(tiny_model(max_positions=CONTEXT)), tokenizer)
    with running(partial(build_engine, normalizer=normalizer), tokenizer=tokenizer) as found:
        remote = ServerLanguageModel(f"{found.url}/v1")
        assert remote.context == CONTEXT
        for request, theirs, ours in zip(NON_ASCII, remote.respond(NON_ASCII), model.respond(NON_ASCII), strict=True):
            assert isinstance(theirs, Likelihood) and isinstance(ours, Likelihood)
            assert (theirs.num_tokens, theirs.greedy) == (ours.num_tokens, ours.greedy), request
            assert theirs.log_probability == pytest.approx(ours.log_probability, abs=1e-4), request
        (measured,) = remote.respond([Measure(NON_ASCII[1].context)])
        (known,) = model.respond([Measure(NON_ASCII[1].context)])
        assert isinstance(measured, TokenLikelihoods) and isinstance(known, TokenLikelihoods)
        assert measured.log_probabilities == pytest.approx(known.log_probabilities, abs=1e-4)
        assert measured.num_bytes == len(NON_ASCII[1].context.encode())
        assert not remote.truncated
        remote.respond([Score("the story of light " * 200, " a")])
        assert remote.truncated == 1
