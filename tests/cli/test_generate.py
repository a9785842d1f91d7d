from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import persimmon
from persimmon.cli.main import main
from tiny_directory import write_tiny_directory

GREEDY = ["--temperature", "0", "--max-tokens", "12", "--logit-bias", "1=-100"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_directory(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def expected(directory: str) -> persimmon.Generation:
    model = persimmon.load(directory, device="cpu")
    return model.generate("the story", temperature=0.0, max_tokens=12, logit_bias={1: -100.0}, logprobs=2)


def set_stdin(monkeypatch: pytest.MonkeyPatch, content: bytes, *, terminal: bool = False) -> None:
    stream = io.TextIOWrapper(io.BytesIO(content))
    stream.isatty = lambda: terminal  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stdin", stream)


def test_only_the_text_is_on_stdout(
    directory: str, expected: persimmon.Generation, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", directory, "--prompt", "the story", *GREEDY]) == 0
    said = capfd.readouterr()
    assert said.out == expected.text and said.err == ""


@pytest.mark.parametrize("flags", [[], ["--prompt", "-"], ["--prompt-file", "-"]])
def test_the_prompt_may_come_from_stdin(
    directory: str, expected: persimmon.Generation, flags: list[str], monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    set_stdin(monkeypatch, b"the story")
    assert main(["generate", directory, *flags, *GREEDY]) == 0
    assert capfd.readouterr().out == expected.text


def test_the_prompt_may_come_from_a_file_and_the_model_from_the_environment(
    directory: str, expected: persimmon.Generation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "prompt.txt").write_bytes(b"the story")
    monkeypatch.setenv("PERSIMMON_MODEL", directory)
    assert main(["generate", "--prompt-file", str(tmp_path / "prompt.txt"), *GREEDY]) == 0
    assert capfd.readouterr().out == expected.text


def test_json_is_one_document_with_everything(
    directory: str, expected: persimmon.Generation, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--prompt", "the story", *GREEDY, "--logprobs", "2", "--json", "--verbose"]
    assert main(["generate", directory, *arguments]) == 0
    said = capfd.readouterr()
    document = json.loads(said.out)
    assert document["text"] == expected.text and document["token_ids"] == expected.token_ids
    assert document["model"] == directory and document["engine"] == persimmon.load(directory, device="cpu").engine_name
    assert document["finish_reason"] == "length" and document["stop"] is None
    usage = expected.usage
    assert document["usage"] == {
        "prompt_tokens": usage.prompt_tokens, "completion_tokens": 12, "cached_tokens": 0,
        "guessed_tokens": 0, "accepted_tokens": 0, "total_tokens": usage.prompt_tokens + 12,
    }  # fmt: skip
    assert document["timings"]["tokens_per_second"] > 0
    assert isinstance(document["seed"], int)
    for entry, token_id in zip(document["logprobs"], expected.token_ids, strict=True):
        assert entry["token_id"] == token_id and entry["logprob"] < 0 and isinstance(entry["piece"], str)
        assert len(entry["alternatives"]) == 2
    assert "device cpu" in said.err and "tokens/s" in said.err


def test_log_probabilities_follow_the_text_as_a_table(
    directory: str, expected: persimmon.Generation, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", directory, "--prompt", "the story", *GREEDY, "--logprobs", "2"]) == 0
    said = capfd.readouterr().out
    assert said.startswith(expected.text + "\n\n")
    table = said[len(expected.text) :].strip().splitlines()
    assert table[0].split() == ["id", "logprob", "piece"] and len(table) == 13


def test_sampling_flags_reach_the_sampler(directory: str, capfd: pytest.CaptureFixture[str]) -> None:
    flags = {
        "max_tokens": 15, "temperature": 1.4, "top_p": 0.9, "top_k": 50, "min_p": 0.01, "repetition_penalty": 1.1,
        "presence_penalty": 0.2, "frequency_penalty": 0.3, "seed": 9, "context_overflow": "shift",
    }  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    extra = ["--stop", "zz", "--stop", "yy", "--logit-bias", "70=-3.5", "--logit-bias", "1=-100", "--no-bos"]
    assert main(["generate", directory, "--prompt", "a light", *words, *extra, "--json"]) == 0
    model = persimmon.load(directory, device="cpu")
    result = model.generate("a light", bos=False, stop=["zz", "yy"], logit_bias={70: -3.5, 1: -100.0}, **flags)
    assert json.loads(capfd.readouterr().out)["token_ids"] == result.token_ids


def test_every_sampling_parameter_has_a_flag() -> None:
    import dataclasses

    from persimmon.cli.main import verb_parser

    flags = verb_parser("generate")._option_string_actions
    for field in dataclasses.fields(persimmon.SamplingParams):
        assert f"--{field.name.replace('_', '-')}" in flags


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt", "a", "--temperature", "-1"], "temperature must be a number from 0 to 100, got -1.0"),
        (["--prompt", "a", "--top-p", "0"], "top_p"),
        (["--prompt", "a", "--logit-bias", "7"], "'7' is not ID=X"),
        (["--prompt", "a", "--logit-bias", "999=1"], "token 999; the vocabulary has 320"),
        (["--prompt", "a", "--prompt-file", "b"], "not allowed with"),
        (["--prompt-file", "missing.txt"], "missing.txt does not exist"),
        (["--prompt", "a" * 60, "--context", "40"], "tokens and the context 40"),
        (["--prompt", "a", "--dtype", "float16"], "65504"),
        (["--prompt", "a", "--context-overflow", "ignore"], "--context-overflow"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    directory: str, flags: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", directory, *flags]) == 2
    said = capfd.readouterr()
    assert said.out == "" and message in said.err.splitlines()[-1]


def test_prompts_that_cannot_be_read(
    directory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    assert main(["generate", directory, "--prompt-file", str(tmp_path / "latin.txt")]) == 2
    assert "latin.txt is not UTF-8: byte 3" in capfd.readouterr().err
    set_stdin(monkeypatch, b"", terminal=True)
    assert main(["generate", directory]) == 2
    assert "no prompt" in capfd.readouterr().err
    assert main(["generate", str(tmp_path / "nowhere"), "--prompt", "a"]) == 2


@pytest.mark.skipif(os.name != "posix", reason="other systems have no SIGINT to send")
def test_ctrl_c_leaves_the_text_so_far_and_exits_with_130(directory: str) -> None:
    command = [sys.executable, "-m", "persimmon.cli.main", "generate", directory, "--prompt", "the"]
    command += ["--max-tokens", "100000", "--context-overflow", "shift", "--context", "64", "--logit-bias", "1=-100"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    first = os.read(process.stdout.fileno(), 1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert first and errors.decode().strip() == "persimmon: interrupted"


def test_a_file_of_prompts_is_answered_and_taken_up_again(
    directory: str, expected: persimmon.Generation, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    source.write_text('{"prompt": "the story"}\n{"id": "x", "messages": [{"role": "user", "content": "light"}]}\n')
    command = ["generate", directory, "--input", str(source), "--output", str(target), *GREEDY]
    assert main(command) == 0
    assert "2 answered" in capfd.readouterr().err
    lines = {line["id"]: line for line in map(json.loads, target.read_text().splitlines())}
    assert set(lines) == {"1", "x"} and lines["1"]["text"] == expected.text
    before = target.read_bytes()
    assert main(command) == 0
    said = capfd.readouterr()
    assert "2 were there already" in said.err and said.out == "" and target.read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--input", "in.jsonl"], "belong together"),
        (["--output", "out.jsonl"], "belong together"),
        (["--input", "in.jsonl", "--output", "out.jsonl", "--json"], "--json does not go with --input"),
        (["--input", "in.jsonl", "--output", "out.jsonl", "--prompt", "a"], "--prompt does not go with --input"),
        (["--input", "none.jsonl", "--output", "out.jsonl"], "none.jsonl does not exist"),
        (["--input", "in.jsonl", "--output", "in.jsonl"], "the same file"),
    ],
)
def test_wrong_batches_are_refused(
    directory: str, flags: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("in.jsonl").write_text('{"prompt": "a"}\n')
    assert main(["generate", directory, *flags]) == 2
    assert words in capfd.readouterr().err and not Path("out.jsonl").exists()


def test_a_prompt_file_is_made_used_and_refused_when_damaged(
    directory: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "story.prompt"
    text = "the story of light " * 5
    options = ["--temperature", "0", "--max-tokens", "5", "--json"]
    args = ["generate", directory, "--prompt", text, "--prompt-cache", str(file), *options]
    first, second = (json.loads(capfd.readouterr().out) for _ in range(2) if main(args) == 0)
    assert first["text"] == second["text"]
    assert first["usage"]["cached_tokens"] == 0
    assert second["usage"]["cached_tokens"] == second["usage"]["prompt_tokens"] - 1
    file.write_bytes(file.read_bytes()[:-10])
    assert main(args) == 2
    assert f"prompt file {file} cannot be used: it has" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--prompt-cache", "no/file"], 1, "cannot be written: No such file"),
        (["--prompt-cache", "."], 1, "cannot be written: Is a directory"),
        (["--lookup", "65"], 2, "lookup must be from 0 to 64"),
        (["--temperature", "-1"], 2, "temperature"),
    ],
)
@pytest.mark.parametrize("verb", ["generate", "chat"])
def test_what_is_wrong_shows_before_the_model_is_loaded(
    verb: str, flags: list[str], code: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main([verb, "no-such-model", "--prompt", "a", *flags]) == code
    assert words in capfd.readouterr().err


def test_a_batch_is_read_before_its_model_is_loaded(
    directory: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": 3}\n')
    (Path(shutil.copytree(directory, tmp_path / "damaged")) / "model.safetensors").write_bytes(b"")
    files = ["--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    assert main(["generate", str(tmp_path / "damaged"), *files]) == 2
    assert "line 1: prompt must be a text" in capfd.readouterr().err


def test_guessing_changes_no_text(directory: str, capfd: pytest.CaptureFixture[str]) -> None:
    args = ["generate", directory, "--prompt", "the story of the story of", "--temperature", "0", "--max-tokens", "20"]
    assert main([*args, "--lookup", "4", "--json"]) == 0
    guessed = json.loads(capfd.readouterr().out)
    assert main([*args, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["text"] == guessed["text"]
    assert guessed["usage"]["guessed_tokens"] >= guessed["usage"]["accepted_tokens"]
