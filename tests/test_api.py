from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import persimmon
from persimmon import chat, engines
from persimmon.api import Persimmon
from persimmon.config import preset
from persimmon.errors import (
    CheckpointError,
    ContextLengthError,
    InputError,
    NotFoundError,
    PersimmonError,
    UnavailableError,
)
from persimmon.infer.reference import ReferenceDecoder
from scripted_decoder import says
from tiny_directory import write_tiny_directory
from tiny_tokenizer import tiny_tokenizer

QUESTION = [{"role": "user", "content": "the story"}]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_directory(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def model(directory: Path) -> Persimmon:
    return persimmon.load(str(directory), device="cpu", engine="reference")


# -- loading ------------------------------------------------------------------------------------------------


def test_importing_the_package_imports_no_torch() -> None:
    program = "import persimmon, sys; persimmon.ModelConfig; persimmon.SamplingParams; dir(persimmon); "
    program += "heavy = {'torch', 'numpy', 'sentencepiece', 'transformers'} & set(sys.modules); assert not heavy, heavy"
    subprocess.run([sys.executable, "-c", program], check=True)
    times = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import persimmon"], check=True, capture_output=True, text=True
    ).stderr
    assert "persimmon" in times and "torch" not in times


def test_every_public_name_exists() -> None:
    for name in persimmon.__all__:
        assert getattr(persimmon, name) is not None
    assert set(persimmon.__all__) <= set(dir(persimmon))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        persimmon.nothing  # noqa: B018


def test_every_error_is_public() -> None:
    from persimmon import errors

    kinds = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, PersimmonError)}
    assert kinds <= set(persimmon.__all__)


def test_the_loaded_model_says_what_it_is(model: Persimmon, directory: Path) -> None:
    assert isinstance(model, persimmon.Persimmon)
    assert model.engine_name == "reference" and isinstance(model.decoder, ReferenceDecoder)
    assert model.config.vocab_size == model.tokenizer.vocab_size == 320
    assert model.context == 16_384
    assert [line.split()[0] for line in model.choices] == ["device", "engine", "dtype"]
    assert model.decoder.model.embed_tokens.weight.dtype == torch.float32  # small enough for this machine


def test_dtype_context_threads_and_rotary_precision(directory: Path) -> None:
    before = torch.get_num_threads()
    model = persimmon.load(
        directory,
        device="cpu",
        engine="reference",
        dtype="bfloat16",
        context=50,
        threads=1,
        rotary_precision="bfloat16",
    )
    try:
        assert model.decoder.model.lm_head.weight.dtype == torch.bfloat16
        assert model.context == 50 and model.config.rotary_precision == "bfloat16"
        assert torch.get_num_threads() == 1
        result = model.generate("the", max_tokens=100, logit_bias={1: -100.0})
        assert result.usage.prompt_tokens + result.usage.completion_tokens == 51
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"device": "tpu"}, InputError, "device must be one of"),
        ({"device": "cuda:99"}, UnavailableError, "not available"),
        ({"engine": "warp"}, InputError, "one of auto, cpu, cuda, reference"),
        ({"device": "cuda:x"}, InputError, "device must be one of"),
        ({"threads": 100_000}, InputError, "from 1 to 1024, got 100000"),
        ({"dtype": "float16"}, InputError, "65504"),
        ({"dtype": "int3"}, InputError, "dtype must be one of"),
        ({"context": 0}, InputError, "1 to the model's 16384"),
        ({"context": 20_000}, InputError, "16384"),
        ({"threads": 0}, InputError, "threads"),
        ({"rotary_precision": "int8"}, InputError, "rotary_precision"),
        (
            {"engine": "reference", "sparsity_margin": 1.0},
            InputError,
            "'reference' does not support sparsity_margin",
        ),
    ],
)
def test_impossible_options_are_refused(
    directory: Path, options: dict[str, object], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        persimmon.load(directory, **{"device": "cpu", **options})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model.generate(b"abc"), "text or integer token ids"),
        (lambda model: model.generate([True]), "text or integer token ids"),
        (lambda model: model.generate("a", stop=5), "stop must be text"),
        (lambda model: model.generate("a", logit_bias=[1]), "logit_bias must be a mapping"),
        (lambda model: model.chat("hi"), "messages must be a list"),
        (lambda model: model.chat(["hi"]), "message 0: expected role and content"),
        (lambda model: model.logits("abc"), "integers"),
        (lambda model: model.logits([[1, 2], [3]]), "integers"),
        (lambda model: model.tokenizer.encode(5), "must be a string"),
    ],
)
def test_what_is_no_text_or_token_is_refused(
    directory: Path, call: Callable[[persimmon.Persimmon], object], message: str
) -> None:
    with pytest.raises(PersimmonError, match=message):
        call(persimmon.load(directory, device="cpu"))


def test_damaged_numbers_of_a_small_model_are_refused(directory: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(directory, tmp_path / "damaged")
    weights = damaged / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-2] ^= 1
    weights.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged or was changed"):
        persimmon.load(damaged, device="cpu")


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        persimmon.load(tmp_path / "nowhere")


def test_dtype_is_chosen_by_device_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "memory_available", lambda: 20 * 10**9)
    assert engines.choose_dtype("auto", "cpu", "bfloat16", 10**9).value == "float32"
    assert engines.choose_dtype("auto", "cpu", "bfloat16", 9 * 10**9).value == "bfloat16"
    assert engines.choose_dtype("auto", "cuda:1", "bfloat16", 10**9).value == "bfloat16"
    assert engines.choose_dtype("auto", "cuda", "float32", 10**9).value == "float32"
    assert engines.choose_dtype("auto", "cuda", "float16", 10**9).value == "bfloat16"
    monkeypatch.setattr(engines, "memory_available", lambda: None)
    assert engines.choose_dtype("auto", "mps", "bfloat16", 9 * 10**9).value == "float32"


def test_auto_takes_the_cpu_engine_where_it_was_built(directory: Path, model: Persimmon) -> None:
    """Its greedy ids are the reference's."""
    if "cpu" not in engines.installed_engines():
        pytest.skip(engines.missing_engines()["cpu"])
    fast = persimmon.load(directory, device="cpu")
    assert fast.engine_name == "cpu"
    greedy = {"max_tokens": 100, "temperature": 0.0, "logit_bias": {1: -100.0}}
    assert fast.generate("the story", **greedy).token_ids == model.generate("the story", **greedy).token_ids


def test_auto_takes_the_reference_where_the_cpu_engine_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    odd = preset("test", hidden_size=12, num_heads=2, partial_rotary_factor=1.0)
    assert engines.choose_engine("auto", "cpu", config=odd).value == "reference"
    with pytest.raises(UnavailableError):
        engines.choose_engine("cpu", "cpu", config=odd)
    unbuilt = dataclasses.replace(engines.ENGINES["cpu"], why_unavailable=lambda: "not built")
    monkeypatch.setitem(engines.ENGINES, "cpu", unbuilt)
    choice = engines.choose_engine("auto", "cpu")
    assert choice.value == "reference" and "not built" in choice.reason
    with pytest.raises(UnavailableError, match="not built"):
        engines.choose_engine("auto", "cpu", packed=True)


def test_auto_device_prefers_cuda_then_mps(monkeypatch: pytest.MonkeyPatch) -> None:
    for cuda, mps, expected in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda cuda=cuda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda mps=mps: mps)
        assert engines.choose_device("auto").value == expected


# -- logits -------------------------------------------------------------------------------------------------


def test_logits_of_rows_and_of_one_row(model: Persimmon) -> None:
    ids = [[1, 20, 30], [1, 40, 50]]
    logits = model.logits(ids)
    assert logits.shape == (2, 3, 320) and logits.dtype == torch.float32
    with torch.inference_mode():
        expected = model.decoder.model(torch.tensor(ids))
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(model.logits(torch.tensor(ids)), logits)
    torch.testing.assert_close(model.logits([1, 40, 50]), logits[1:], rtol=1e-4, atol=1e-4)
    for bad in ([], [[]], [[0.5]], [[[1]]]):
        with pytest.raises(InputError, match="integers"):
            model.logits(bad)
    with pytest.raises(InputError, match="320"):
        model.logits([[320]])


# -- generation ---------------------------------------------------------------------------------------------


def test_text_and_its_ids_give_the_same(model: Persimmon) -> None:
    by_text = model.generate("the story", max_tokens=20, seed=0)
    by_ids = model.generate(model.tokenizer.encode("the story", bos=True), max_tokens=20, seed=0)
    by_array = model.generate(np.array(model.tokenizer.encode("the story", bos=True)), max_tokens=20, seed=0)
    assert by_text.token_ids == by_ids.token_ids == by_array.token_ids
    assert by_text.usage.prompt_tokens == 1 + len(model.tokenizer.encode("the story"))
    bare = model.generate("the story", bos=False, max_tokens=1)
    assert bare.usage.prompt_tokens == by_text.usage.prompt_tokens - 1


@pytest.mark.parametrize("prompt", [[1.5], ["a"], 7, None])
def test_a_prompt_is_text_or_ids(model: Persimmon, prompt: object) -> None:
    with pytest.raises(InputError, match="text or integer token ids"):
        model.generate(prompt)


def test_an_empty_text_begins_a_document(model: Persimmon) -> None:
    assert model.generate("", max_tokens=5, seed=0).usage.prompt_tokens == 1
    with pytest.raises(InputError, match="no tokens"):
        model.generate("", bos=False)


def test_a_stream_and_its_result(model: Persimmon) -> None:
    stream = model.stream("the", max_tokens=20, seed=1, logprobs=1)
    text = "".join(piece.text for piece in stream)
    assert text == stream.result().text == model.generate("the", max_tokens=20, seed=1).text


def test_a_session_across_prompts(model: Persimmon) -> None:
    session = model.new_session()
    model.generate("the story", max_tokens=3, session=session)
    again = model.generate("the story of a light", max_tokens=3, session=session)
    assert again.usage.cached_tokens == 1 + len(model.tokenizer.encode("the story"))


def test_errors_come_when_the_call_is_made(model: Persimmon) -> None:
    with pytest.raises(InputError, match="did you mean max_tokens"):
        model.stream("the", max_new_tokens=5)
    with pytest.raises(InputError, match="temperature"):
        model.stream_chat(QUESTION, temperature=-1)
    with pytest.raises(ContextLengthError, match="16385 tokens"):
        model.stream([5] * 16_385)
    with pytest.raises(InputError, match="role"):
        model.stream_chat([{"role": "robot", "content": "hi"}])


# -- chat ---------------------------------------------------------------------------------------------------


def chat_model(reply: str) -> tuple[Persimmon, list[int]]:
    """A model that answers QUESTION with `reply`, and the ids of that prompt."""
    tokenizer = tiny_tokenizer()
    prompt = chat.encode(tokenizer, QUESTION)
    return Persimmon(says(len(prompt), tokenizer.encode(reply)), tokenizer), prompt


def test_a_chat_ends_at_the_next_turn_and_drops_the_formats_space() -> None:
    model, prompt = chat_model(" a light.\n\nhuman: more")
    result = model.chat(QUESTION, temperature=0)
    assert (result.text, result.finish_reason, result.stop) == ("a light.", "stop", "\n\nhuman:")
    assert result.usage.prompt_tokens == len(prompt)


def test_a_chats_own_stop_strings_come_on_top() -> None:
    model, _ = chat_model(" a light.\n\nhuman: more")
    assert model.chat(QUESTION, temperature=0, stop=["ght"]).text == "a li"


def test_the_next_turn_reads_only_what_is_new(model: Persimmon) -> None:
    first = model.chat(QUESTION, max_tokens=8, seed=2, logit_bias={1: -100.0})
    messages = [*QUESTION, {"role": "assistant", "content": first.text}, {"role": "user", "content": "of light"}]
    cached = model.chat(messages, max_tokens=8, seed=2).usage.cached_tokens
    assert cached >= first.usage.prompt_tokens


def test_two_chats_at_once_do_not_meet(model: Persimmon) -> None:
    questions = [QUESTION, [{"role": "user", "content": "a light"}]]
    settings = {"max_tokens": 15, "seed": 7, "logit_bias": {1: -100.0}}
    alone = [model.chat(question, **settings).token_ids for question in questions]
    streams = [model.stream_chat(question, **settings) for question in questions]
    while any([next(stream, None) for stream in streams]):
        pass
    assert [stream.result().token_ids for stream in streams] == alone
