"""Batches from the command line that are killed for real, with one engine and with several on Ray."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tiny_directory import write_tiny_directory

LINES = 60
SAMPLING = ["--max-tokens", "24", "--logit-bias", "1=-100", "--seed", "5", "--quiet", "--threads", "1"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_directory(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    lines: list[dict[str, Any]] = [{"prompt": f"the story {'ab' * number}"} for number in range(LINES - 2)]
    lines += [
        {"id": "chat", "messages": [{"role": "user", "content": "light"}]},
        {"id": "long", "prompt": "x" * 90_000},
    ]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return source


def command(directory: str, source: Path, target: Path, *more: str) -> list[str]:
    verb = [sys.executable, "-m", "persimmon.cli.main", "generate", directory]
    return [*verb, "--input", str(source), "--output", str(target), "--engine", "reference", *SAMPLING, *more]


def answers(path: Path) -> dict[str, Any]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({line["id"] for line in lines}) == len(lines), "nothing twice"
    return {line["id"]: line for line in lines}


def kill_after(lines: int, arguments: list[str], target: Path) -> None:
    """SIGKILL once so many answers are there; what it started must end too."""
    process = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, start_new_session=True)
    until = time.monotonic() + 240
    while not target.exists() or target.read_bytes().count(b"\n") < lines:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGSTOP)  # it must not end while its children are looked for, which takes a while
    children = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait(30)
    until = time.monotonic() + 60
    while (alive := [child for child in children if runs(child)]) and time.monotonic() < until:
        time.sleep(0.1)
    for child in alive:
        child.kill()
    engines = [child for child in alive if "MapWorker" in child.name()]
    assert not engines, f"outlived the command: {engines}"


def runs(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def killed_and_resumed(directory: str, prompts: Path, folder: Path, *more: str) -> dict[str, Any]:
    target = folder / "killed.jsonl"
    arguments = command(directory, prompts, target, *more)
    kill_after(6, arguments, target)
    there = target.read_bytes()
    assert 6 <= there.count(b"\n") < LINES
    assert subprocess.run(arguments, stdin=subprocess.DEVNULL, timeout=280).returncode == 1  # one does not fit
    kept = [line for line in there[: there.rfind(b"\n")].splitlines() if b'"error"' not in line]
    assert target.read_bytes().splitlines()[: len(kept)] == kept, "what was answered stays as it was"
    return answers(target)


def test_a_killed_batch_goes_on_to_the_same_answers(directory: str, prompts: Path, tmp_path: Path) -> None:
    found = killed_and_resumed(directory, prompts, tmp_path)
    whole = tmp_path / "whole.jsonl"
    subprocess.run(command(directory, prompts, whole), stdin=subprocess.DEVNULL, timeout=280)
    assert found == answers(whole) and len(found) == LINES
    assert "context" in found["long"]["error"]


@pytest.mark.slow
def test_so_does_one_on_ray_and_its_answers_are_those_of_one_engine(
    directory: str, prompts: Path, tmp_path: Path
) -> None:
    pytest.importorskip("ray.data", reason="needs the extra packages of persimmon[ray]")
    whole = tmp_path / "whole.jsonl"
    subprocess.run(command(directory, prompts, whole), stdin=subprocess.DEVNULL, timeout=280)
    assert killed_and_resumed(directory, prompts, tmp_path, "--ray", "2") == answers(whole)
