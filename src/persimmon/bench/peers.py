"""Peers that run beside us: each in a process of its own, asked for one run at a time.

Two kinds. `transformers` is one of the scripts in benchmarks/peers: it loads once, says `{"ready": ...}`, and then
answers every line on its standard input with a line `{"tokens_per_second": ...}`. Anything else is a COMMAND, run once
per measurement, with {tokens}, {context}, {length}, {batch} and {threads} filled in; its output is what llama-bench
prints with `-o json`, or ends with a line of JSON that holds `tokens_per_second`.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import IO, Any, Protocol

from persimmon.errors import InputError, UnavailableError

TRANSFORMERS = "transformers"

_PEERS = Path(__file__).parents[3] / "benchmarks" / "peers"

Settings = Mapping[str, Any]


class Peer(Protocol):
    """Another program that does the same work."""

    name: str
    restarts: bool
    """It takes the memory that it needs anew for every run, and may push our files out of the page cache."""

    @property
    def facts(self) -> dict[str, Any]:
        """What is known about it so far: versions, peak memory."""

    def run(self) -> float:
        """One measurement in tokens per second. Raises UnavailableError when the peer fails."""

    def close(self) -> None:
        """End it."""


def peer_of(against: str, script: str, settings: Settings, *, restart: bool = False) -> Peer:
    """`transformers` (with the settings of its script), or a command.

    restart: give the script's memory back between measurements, for two models that do not fit side by side.
    """
    if against == TRANSFORMERS:
        return ScriptPeer(script, settings, restart=restart)
    return CommandPeer(against, settings)


def script_path(name: str) -> Path:
    """A script of benchmarks/peers; UnavailableError in an installation without it."""
    file = _PEERS / name
    if not file.is_file():
        raise UnavailableError(f"{file} is missing: peers run from a checkout of the repository")
    return file


class ScriptPeer:
    """A script of benchmarks/peers in a process that stays."""

    def __init__(self, script: str, settings: Settings, *, restart: bool = False) -> None:
        """`settings` reach the script as one JSON argument."""
        self.name = TRANSFORMERS
        kept = ("dtype", "threads")  # not the folder and not the whole configuration
        self.facts: dict[str, Any] = {"script": script, **{name: settings[name] for name in kept if name in settings}}
        self.facts["weights"] = "the same" if settings.get("directory") else "random"
        self._command = [sys.executable, str(script_path(script)), json.dumps(dict(settings))]
        self.restarts = restart
        self._process: subprocess.Popen[str] | None = None
        self._log: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed by close)

    def run(self) -> float:
        """One measurement; starts the script first where it is not running."""
        process = self._process or self._start()
        assert process.stdin is not None, "started with pipes"
        answer = self._ask(process, "{}\n")
        self.facts |= {name: value for name, value in answer.items() if name != "tokens_per_second"}
        if self.restarts:
            self._stop()
        return float(answer["tokens_per_second"])

    def close(self) -> None:
        """End the script."""
        self._stop()
        self._log.close()

    def _start(self) -> subprocess.Popen[str]:
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        self.facts |= self._ask(self._process, "")["ready"]
        return self._process

    def _ask(self, process: subprocess.Popen[str], request: str) -> dict[str, Any]:
        """Send a line (or only listen) and read one back."""
        assert process.stdin is not None and process.stdout is not None, "started with pipes"
        try:
            process.stdin.write(request)
            process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended; its log says why
        answer = process.stdout.readline()
        if not answer:
            raise UnavailableError(f"the peer {self._command[1]} ended: {self._last_words()}")
        document: dict[str, Any] = json.loads(answer)
        return document

    def _last_words(self) -> str:
        self._log.seek(0)
        return self._log.read().strip()[-500:] or "it said nothing"

    def _stop(self) -> None:
        if self._process is None:
            return
        assert self._process.stdin is not None, "started with pipes"
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None


class CommandPeer:
    """A command that measures itself and prints JSON, started for every measurement."""

    def __init__(self, command: str, settings: Settings) -> None:
        self.restarts = True
        self._words = fill_in(command, settings)
        self.name = Path(self._words[0]).name
        if self.name.startswith("python") and self._words[1:2] == ["-m"] and len(self._words) > 2:
            self.name = self._words[2].partition(".")[0]  # python -m package.module
        self.facts: dict[str, Any] = {"command": " ".join(map(_short, self._words))}

    def run(self) -> float:
        """Start it and read its result."""
        with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
            try:
                process = subprocess.Popen(self._words, stdin=subprocess.DEVNULL, stdout=output, stderr=errors)
            except OSError as error:
                raise UnavailableError(f"the peer {self._words[0]} cannot be started: {error}") from None
            code, peak = _wait(process)
            if code:
                errors.seek(0)
                raise UnavailableError(f"the peer {self.name} failed ({code}): {errors.read().strip()[-500:]}")
            output.seek(0)
            rate, facts = read_result(self.name, output.read())
        self.facts |= {**facts, "peak_rss_bytes": max(peak, self.facts.get("peak_rss_bytes", 0))}
        return rate

    def close(self) -> None:
        """Nothing stays."""


def fill_in(command: str, settings: Settings) -> list[str]:
    """The words of a command with {name} replaced by its setting. Raises InputError for an empty command."""
    words = shlex.split(command)
    if not words:
        raise InputError("--against needs transformers or a command, got nothing")
    for name, value in settings.items():
        words = [word.replace("{" + name + "}", str(value)) for word in words]
    return words


def _wait(process: subprocess.Popen[bytes]) -> tuple[int, int]:
    """(exit code, peak resident bytes) of a process, once it has ended."""
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _short(word: str) -> str:
    """A word without the folders of a path: rows tell what ran, not where it lay."""
    return Path(word).name if os.sep in word else word


def read_result(name: str, output: str) -> tuple[float, dict[str, Any]]:
    """(tokens per second, what else is known) from a command's output.

    llama-bench's list holds one entry per test; its samples are tokens per second.
    """
    try:
        entries = json.loads(output)
        if isinstance(entries, list):
            (entry,) = entries
            known = ("build_commit", "model_type", "n_threads", "n_prompt", "n_gen", "n_depth")
            return float(median(entry["samples_ts"])), {key: entry[key] for key in known if key in entry}
    except (ValueError, KeyError, TypeError):
        pass
    try:
        document = json.loads(output.strip().splitlines()[-1])
        return float(document["tokens_per_second"]), {k: document[k] for k in ("model", "versions") if k in document}
    except (ValueError, KeyError, TypeError, IndexError):
        raise UnavailableError(
            f"the peer {name} printed neither llama-bench's JSON with one test nor a last line with tokens_per_second: "
            f"{output.strip()[-300:]!r}"
        ) from None
