"""Every command of README.md, docs/training.md and docs/finetuning.md runs, at small size where it would take long."""

from __future__ import annotations

import gzip
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from made_checkpoints import made_config, made_model, made_tokenizer, release_state, write_release
from made_corpus import made_code, made_text

ROOT = Path(__file__).parents[1]

# Commands that are not run as they stand: what is run instead, and why.
SMALLER = {
    "persimmon data prepare configs/mini-data.yaml": ["--set", "vocabulary.size=330", "--set", "held_out=0.1"],
    "persimmon tokenizer train --recipe configs/mini-data.yaml": ["--set", "vocabulary.size=330"],
    "persimmon pretrain configs/mini.yaml": [
        "--set", "tokens=65536", "--set", "model.preset=test", "--set", "processes=1",
        "--set", "loop.dtype=float32", "--set", "loop.evaluate_every=0",
    ],
    "persimmon finetune configs/mini-chat.yaml": [
        "--set", "epochs=0.2", "--set", "processes=1", "--set", "loop.dtype=float32",
    ],
    **{
        f"persimmon finetune configs/{name}.yaml --set root": [
            "--set", "row_length=128", "--set", "batch_tokens=512", "--set", "epochs=1", "--set", "held_out=0.1",
            "--set", "threads=1",  # two wait for each other where others use the cores as well
        ]
        for name in ("sft", "lora", "qlora", "dpo")
    },
}  # fmt: skip
ONLY_PARSED = {
    "pip install -e . -c constraints.txt": "this is how the environment of the tests was made",
    "torchrun --nproc-per-node 8 -m persimmon.cli.main pretrain configs/1b.yaml": "test_resume.py starts a small one",
    "make test": "it would start the tests again",
    "make check": "the gate runs it beside the tests",
}


def commands(page: str) -> list[str]:
    """The lines after `$ ` in the console blocks of a page, without comments."""
    blocks = re.findall(r"```console\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    lines = [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ ")]
    return [re.sub(r"\s+#.*", "", line).strip() for line in lines]


@pytest.fixture
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the README assumes it: configs/, DATA/ and a release tar."""
    place = tmp_path_factory.mktemp("readme")
    for name in ("configs", "README.md"):
        (place / name).symlink_to(ROOT / name)
    data = place / "DATA"
    for name, make in (("text", made_text), ("code", made_code)):
        folder = data / "pretrain" / name
        folder.mkdir(parents=True)
        lines = [json.dumps({"text": make(i, 20 + i)}) for i in range(40)]
        (folder / "made.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    (data / "chat").mkdir()
    record = {"messages": [{"role": "user", "content": "Hi {}"}, {"role": "assistant", "content": "Hello."}]}
    lines = [json.dumps(record).replace("{}", str(i)) for i in range(40)]
    for name in ("sgd", "p3_sample", "gsm8k_train", "dolly", "oasst", "self_instruct"):
        (data / "chat" / f"{name}.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    (data / "preferences").mkdir()
    pair = {"prompt": "Hi {}", "chosen": "Hello.", "rejected": "Go away."}
    lines = [json.dumps(pair).replace("{}", str(i)) for i in range(40)]
    (data / "preferences" / "made.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    (data / "eval").mkdir()
    arc = [{"id": f"a{i}", "query": f"Question: {i}?", "choices": ["x", "y", "z"], "gold": i % 3} for i in range(20)]
    blanks = [
        {"id": f"w{i}", "context_options": [f"Ann {i}", f"Bob {i}"], "continuation": "ran.", "gold": i % 2}
        for i in range(20)
    ]
    for name, records in (("arc_easy", arc), ("winogrande", blanks)):
        text = "\n".join(json.dumps(record) for record in records)
        (data / "eval" / f"{name}.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    tokenizer = made_tokenizer(unused=(300, 301))
    release = release_state(made_model(made_config(tokenizer)))
    write_release(place / "8b_chat_model_release.tar", release, tokenizer.serialized)
    return place


def smaller(command: str) -> list[str]:
    """The command's words with the changes that keep it short."""
    words = shlex.split(command)
    for start, changes in SMALLER.items():
        if command.startswith(start):
            words += changes
    return words


def run(words: list[str], place: Path) -> subprocess.CompletedProcess[str]:
    """Run a `persimmon` or `make` command with empty standard input."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}
    if words[0] == "persimmon":
        words = [sys.executable, "-m", "persimmon.cli.main", *words[1:]]
    return subprocess.run(
        words, cwd=place, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=280,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(600)  # a page starts about ten programs, and a busy machine takes its time for each
@pytest.mark.parametrize("page", ["README.md", "docs/training.md", "docs/finetuning.md"])
def test_documented_commands_run(page: str, workplace: Path, request: pytest.FixtureRequest) -> None:
    found = commands(page)
    assert found
    for command in found:
        if command in ONLY_PARSED or command.startswith("make "):
            continue
        result = run(smaller(command), workplace)
        assert result.returncode == 0, f"{page}: {command}\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}"


def test_make_chat_answers_without_input() -> None:
    """With the environment `make` made, `make chat` answers one built-in question."""
    environment = Path(sys.prefix)
    if not (environment / "base.done").is_file():
        pytest.skip("the tests do not run in an environment made by `make`")
    result = run(["make", "-C", str(ROOT), "chat", f"VENV={environment}"], ROOT)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.strip().splitlines()) >= 2


def test_the_python_example_runs() -> None:
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (example,) = (text for text in examples if "import persimmon" in text)  # the client's is in tests/serve
    result = run([sys.executable, "-c", example], ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()
