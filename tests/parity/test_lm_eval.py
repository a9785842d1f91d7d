"""Equality with lm-eval driving transformers' Persimmon: log-likelihoods, texts, accuracy, on the same checkpoint."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

lm_eval = pytest.importorskip("lm_eval")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")
os.environ["HF_HUB_OFFLINE"] = "1"

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from persimmon.checkpoints import hub  # noqa: E402
from persimmon.evals.data import read_records  # noqa: E402
from persimmon.evals.lm_eval_plugin import PersimmonLM  # noqa: E402
from persimmon.evals.runner import Settings, prepare, run_task  # noqa: E402
from persimmon.evals.tasks import TASKS  # noqa: E402
from persimmon.model import PersimmonModel  # noqa: E402
from tiny_model import tiny_model  # noqa: E402
from tiny_tokenizer import tiny_tokenizer  # noqa: E402

pytest_plugins = ["evals.conftest"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint") / "tiny"
    hub.save_model(readable_model(), tiny_tokenizer(), directory)
    return directory


def readable_model() -> PersimmonModel:
    """Never finds unused pieces or halves of characters likeliest: the libraries print those differently."""
    model, tokenizer = tiny_model(max_positions=1024), tiny_tokenizer()
    unreadable = [
        i for i in range(tokenizer.vocab_size) if i in tokenizer.special_ids or tokenizer.piece_bytes(i) > b"\x7f"
    ]
    with torch.no_grad():
        model.lm_head.weight[unreadable] = 0.0
    return model


@pytest.fixture(scope="module")
def theirs(checkpoint: Path) -> Any:
    model = HFLM(pretrained=str(checkpoint), device="cpu", dtype="float32", batch_size=4, max_length=1024)
    assert type(model.model).__name__ == "PersimmonForCausalLM"
    return model


@pytest.fixture(scope="module")
def ours(checkpoint: Path) -> PersimmonLM:
    return PersimmonLM(str(checkpoint), dtype="float32", lanes=3)


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, args, index) for index, args in enumerate(arguments)]


PAIRS = [
    ("the story of light", " a human"),
    ("the story of light ", "a human"),
    ("Question: how much?\nAnswer:", " 42"),
    ("", "the story"),
    ("x", "\n\nhuman: what?"),
    *((f"the story number {n} of light:", f" {choice}") for n in range(4) for choice in ("the", "adept", "zzz")),
    ("light " * 400, "of the story"),
]


def test_log_likelihoods_are_equal(ours: PersimmonLM, theirs: Any) -> None:
    requests = instances("loglikelihood", PAIRS)
    for args, mine, other in zip(PAIRS, ours.loglikelihood(requests), theirs.loglikelihood(requests), strict=True):
        assert mine[0] == pytest.approx(other[0], abs=1e-3), args
        assert mine[1] == other[1], args


@pytest.mark.parametrize("words", [3, 400, 1500])
def test_rolling_log_likelihoods_are_equal(ours: PersimmonLM, checkpoint: Path, words: int) -> None:
    # lm-eval predicts the opening token as well when the tokenizer adds it; without it both measure the text alone.
    theirs = HFLM(
        pretrained=str(checkpoint), device="cpu", dtype="float32", batch_size=1, max_length=1024, add_bos_token=False
    )
    requests = instances("loglikelihood_rolling", [("the story of light\n" * words,), ("human: a",)])
    mine, other = ours.loglikelihood_rolling(requests), theirs.loglikelihood_rolling(requests)
    # Per token; a sum over thousands of tokens also sums their rounding.
    for request, a, b in zip(requests, mine, other, strict=True):
        assert abs(a - b) < 1e-5 * max(100, len(request.args[0]))


def test_generated_texts_are_equal(ours: PersimmonLM, theirs: Any) -> None:
    settings = {"until": ["\n", "the"], "max_gen_toks": 24, "do_sample": False, "temperature": 0.0}
    requests = instances("generate_until", [(context, settings) for context, _ in PAIRS if context])
    assert ours.generate_until(requests) == theirs.generate_until(requests)


def test_a_whole_task_gives_the_same_scores_three_ways(
    ours: PersimmonLM, theirs: Any, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "sums.yaml").write_text(
        f"""
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data / "arc_easy.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{query}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: gold
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
    )
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)

    def harness(model: Any) -> list[tuple[list[float], float, float]]:
        result = lm_eval.simple_evaluate(
            model=model, tasks=["sums"], task_manager=manager, bootstrap_iters=0, verbosity="ERROR"
        )
        samples = sorted(result["samples"]["sums"], key=lambda sample: sample["doc_id"])[8:]
        return [([r[0] for r in s["filtered_resps"]], s["acc"], s["acc_norm"]) for s in samples]

    task = TASKS["arc_easy"]
    assert task.source is not None
    settings = Settings(shots=0)
    items = prepare(task, "loglikelihood", read_records(task.source, data), [], settings)
    own = run_task(task, "loglikelihood", items, ours.model, settings).answers
    for mine, plugin, other in zip(own, harness(ours), harness(theirs), strict=True):
        scores = [response["log_probability"] for response in mine.responses]
        assert scores == pytest.approx(other[0], abs=1e-3) and scores == pytest.approx(plugin[0], abs=1e-3)
        assert (mine.outcome.metrics["acc"], mine.outcome.metrics["acc_norm"]) == other[1:] == plugin[1:]


def test_continuations_that_fuse_with_their_context_are_scored(ours: PersimmonLM) -> None:
    """`\\n\\nhuman:` is one piece: lm-eval's own cut leaves nothing of the continuation (its issue 1297)."""
    tokenizer = ours.model.tokenizer
    context, continuation = "light\n\nhuman", ":"
    whole = tokenizer.encode(context + continuation)
    assert len(whole) <= len(tokenizer.encode(context))
    ((score, _),) = ours.loglikelihood(instances("loglikelihood", [(context, continuation)]))
    ids = [tokenizer.bos_id, *whole]
    with torch.inference_mode():
        rows = readable_model()(torch.tensor([ids]))[0].double().log_softmax(-1)
    assert score == pytest.approx(float(rows[-2, ids[-1]]), abs=1e-3)


def test_arguments_that_are_not_offered_are_refused(ours: PersimmonLM) -> None:
    from persimmon.errors import InputError

    with pytest.raises(InputError, match="num_beams"):
        ours.generate_until(instances("generate_until", [("a", {"until": [], "num_beams": 4})]))


@pytest.mark.slow
def test_rolling_log_likelihood_over_the_whole_context(tmp_path: Path) -> None:
    """A text longer than 16,384 positions: one whole window and a rest, measured as lm-eval with transformers does."""
    directory, tokenizer = tmp_path / "long", tiny_tokenizer()
    hub.save_model(tiny_model(max_positions=16_384), tokenizer, directory)
    mine = PersimmonLM(str(directory), dtype="float32", lanes=1)
    theirs = HFLM(
        pretrained=str(directory), device="cpu", dtype="float32", batch_size=1, max_length=16_384, add_bos_token=False
    )
    text = "the story of light\n"
    text *= 17_000 * 100 // len(tokenizer.encode(text * 100))
    assert 16_384 < len(tokenizer.encode(text)) < 18_000
    requests = instances("loglikelihood_rolling", [(text,)])
    (found,), (expected,) = mine.loglikelihood_rolling(requests), theirs.loglikelihood_rolling(requests)
    assert abs(found - expected) < 1e-5 * len(text)  # a sum over thousands of tokens also sums their rounding
