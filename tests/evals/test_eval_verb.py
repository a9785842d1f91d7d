"""`persimmon eval` end to end on a tiny checkpoint, and variants of a model against each other."""

import json
from pathlib import Path

import pytest
import torch

from persimmon.checkpoints import hub
from persimmon.cli import eval as eval_verb
from persimmon.cli.main import Parser
from persimmon.errors import InputError
from persimmon.evals.formats import measure
from persimmon.evals.language_model import DecoderLanguageModel
from persimmon.evals.loading import weights_fingerprint
from persimmon.infer.reference import ReferenceDecoder
from tiny_model import tiny_model
from tiny_tokenizer import tiny_tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint") / "tiny"
    hub.save_model(tiny_model(), tiny_tokenizer(), directory)
    return directory


def evaluate(*arguments: str) -> int:
    parser = Parser()
    eval_verb.add_arguments(parser)
    return eval_verb.run(parser.parse_args(arguments))


def test_a_run_writes_everything_and_repeats_exactly(
    checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(checkpoint), "--tasks", "arc_easy,triviaqa", "--data", str(data), "--limit", "6", "--json"]
    assert evaluate(*arguments, "--out", str(tmp_path / "a")) == 0
    output = capsys.readouterr()
    first = json.loads(output.out)
    assert "arc_easy adept: 6/6 questions" in output.err
    names = {"arc_easy", "arc_easy_adept", "triviaqa", "triviaqa_adept"}
    assert set(first["results"]) == names
    assert first["persimmon"]["identity"]["model"] == "tiny" and first["persimmon"]["identity"]["weights"]
    assert (tmp_path / "a" / "report.md").read_text().startswith("# Evaluation of tiny")
    assert len(list((tmp_path / "a").glob("samples_*.jsonl"))) == 4
    assert evaluate(*arguments, "--quiet", "--lanes", "2", "--out", str(tmp_path / "b")) == 0
    output = capsys.readouterr()
    assert output.err == ""
    second = json.loads(output.out)
    for name in names:
        unparsed = [content["persimmon"]["details"][name]["unparsed"] for content in (first, second)]
        assert unparsed[0] == unparsed[1]
    assert evaluate(*arguments, "--quiet", "--out", str(tmp_path / "a")) == 0  # all from the journal
    assert json.loads(capsys.readouterr().out)["results"] == first["results"]
    with pytest.raises(InputError, match="another model"):
        evaluate(*arguments, "--no-bos", "--out", str(tmp_path / "a"))


def test_variants_are_compared(
    checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(checkpoint), "--tasks", "perplexity", "--data", str(data), "--quiet", "--out", str(tmp_path)]
    variants = ["--variant", "bf16:dtype=bfloat16", "--variant", "rotary:rotary_precision=bfloat16"]
    assert evaluate(*arguments, "--dtype", "float32", *variants) == 0
    text = capsys.readouterr().out
    for expected in ("bf16", "rotary", "mean KL", "Nats per token by position", "[256,1024)", "100.00%"):
        assert expected in text
    found = {one["name"]: one for one in json.loads((tmp_path / "fidelity.json").read_text())}
    assert found["tiny"]["kl"] == 0.0 and found["tiny"]["top1_agreement"] == 1.0
    assert found["bf16"]["kl"] > 0 and found["rotary"]["kl"] > 0
    assert (tmp_path / "bf16" / "report.md").exists()


def test_fidelity_equals_the_definition() -> None:
    tokenizer, first, second = tiny_tokenizer(), tiny_model(seed=1), tiny_model(seed=2)
    a, b = (DecoderLanguageModel(ReferenceDecoder(model), tokenizer) for model in (first, second))
    texts = ["the story of light " * 40, "human: a"]
    reference, other = measure(a, [("a", a), ("b", b)], texts)
    kl = nats = 0.0
    agreed = tokens = size = 0
    for text in texts:
        ids = tokenizer.encode(text, bos=True)
        with torch.inference_mode():
            p, q = (m(torch.tensor([ids[:-1]]))[0].double().log_softmax(-1) for m in (first, second))
        kl += float((p.exp() * (p - q)).sum())
        nats -= float(q[range(len(ids) - 1), ids[1:]].sum())
        agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
        tokens, size = tokens + len(ids) - 1, size + len(text)
    assert (reference.kl, reference.top1_agreement, other.num_tokens) == (0.0, 1.0, tokens)
    assert other.kl == pytest.approx(kl / tokens, rel=1e-4)
    assert other.top1_agreement == agreed / tokens
    assert other.bits_per_byte == pytest.approx(nats / 0.6931471805599453 / size, rel=1e-4)


def test_fidelity_needs_one_vocabulary_and_some_text() -> None:
    a = DecoderLanguageModel(ReferenceDecoder(tiny_model()), tiny_tokenizer())
    b = DecoderLanguageModel(ReferenceDecoder(tiny_model()), tiny_tokenizer(add_dummy_prefix=True))
    with pytest.raises(InputError, match="b has another vocabulary"):
        measure(a, [("b", b)], ["text"])
    with pytest.raises(InputError, match="no text"):
        measure(a, [("a", a)], [""])


def test_fingerprints_tell_weights_apart(checkpoint: Path, tmp_path: Path) -> None:
    hub.save_model(tiny_model(seed=5), tiny_tokenizer(), tmp_path / "other")
    assert weights_fingerprint(checkpoint) == weights_fingerprint(checkpoint)
    assert weights_fingerprint(checkpoint) != weights_fingerprint(tmp_path / "other")


def test_long_context_tasks_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.save_model(tiny_model(max_positions=1500), tiny_tokenizer(), tmp_path / "tiny")
    out = str(tmp_path / "out")
    assert evaluate(str(tmp_path / "tiny"), "--tasks", "long", "--limit", "3", "--quiet", "--out", out) == 0
    assert "Needle" in capsys.readouterr().out
    assert "1k, " in (tmp_path / "out" / "report.md").read_text()
    with pytest.raises(InputError, match="at least 1024"):
        evaluate(str(tmp_path / "tiny"), "--context", "900", "--tasks", "needle", "--out", out)


def test_every_option_of_the_model_reaches_it_and_is_recorded(
    checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("persimmon.fast.cpu._native")
    arguments = [str(checkpoint), "--tasks", "perplexity", "--data", str(data), "--quiet", "--json", "--engine", "cpu"]
    margin = ["--sparsity-margin", "inf"]
    assert evaluate(*arguments, "--kv-dtype", "int8", *margin, "--out", str(tmp_path / "a")) == 0
    exact = json.loads(capsys.readouterr().out)
    assert exact["persimmon"]["identity"]["kv_dtype"] == "int8"
    assert exact["persimmon"]["identity"]["sparsity_margin"] == "inf"
    assert evaluate(*arguments, "--out", str(tmp_path / "b")) == 0
    plain = json.loads(capsys.readouterr().out)
    metric = "bits_per_byte,none"
    assert exact["results"]["perplexity"][metric] != plain["results"]["perplexity"][metric]


@pytest.mark.parametrize(
    "flags", [["--no-bos"], ["--dtype", "bfloat16"], ["--kv-dtype", "int8"], ["--threads", "1"], ["--variant", "a:b=c"]]
)
def test_what_sets_up_a_model_here_does_not_go_with_a_server(flags: list[str]) -> None:
    with pytest.raises(InputError, match=f"{flags[0]}: .* --url"):
        evaluate("--url", "http://127.0.0.1:9/v1", "--tasks", "arc_easy", *flags)
