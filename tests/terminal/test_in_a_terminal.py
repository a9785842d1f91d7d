"""The chat in a real terminal: a process on a pseudo-terminal, keys in, screen output out."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pty = pytest.importorskip("pty", reason="pseudo-terminals are POSIX")

PATIENCE = 30.0
"""Seconds; a loaded machine may take long, a right program never needs them."""

_CONTROL = re.compile(r"\x1b(\[[0-9;?>]*[ -/]*[@-~]|\][^\x07]*\x07|[=>(].?)")


class Terminal:
    """A program on a terminal of 60 by 20."""

    def __init__(self, command: list[str], environment: dict[str, str], cwd: Path) -> None:
        self._keys, screen = pty.openpty()
        self.raw = ""
        import fcntl
        import struct
        import termios

        fcntl.ioctl(screen, termios.TIOCSWINSZ, struct.pack("HHHH", 20, 60, 0, 0))
        self.process = subprocess.Popen(
            command, stdin=screen, stdout=screen, stderr=screen, env=environment, cwd=cwd, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(screen)
        self._read = 0  # characters of `shown` that earlier waits have passed

    @property
    def shown(self) -> str:
        """All output so far without control sequences."""
        return _CONTROL.sub("", self.raw)

    def press(self, keys: str) -> None:
        os.write(self._keys, keys.encode())

    def wait_for(self, text: str) -> None:
        """Read until `text` appears behind what was waited for before."""
        end = time.monotonic() + PATIENCE
        while (found := self.shown.find(text, self._read)) < 0:
            assert self._take(end - time.monotonic()), f"no {text!r} after: {self.shown[self._read :]!r}"
        self._read = found + len(text)

    def leave(self) -> int:
        """Press Ctrl-D until the program ends: keys that come before the prompt stands are flushed."""
        end = time.monotonic() + PATIENCE
        while self.process.poll() is None and time.monotonic() < end:
            self.press("\x04")
            self._take(0.2)
        return self.wait_for_end()

    def wait_for_end(self) -> int:
        end = time.monotonic() + PATIENCE
        while self._take(end - time.monotonic()):
            pass
        return self.process.wait(PATIENCE)

    def _take(self, seconds: float) -> bool:
        """Read once; False when the time is over or the program has ended."""
        if seconds <= 0 or not select.select([self._keys], [], [], seconds)[0]:
            return False
        try:
            data = os.read(self._keys, 65536)
        except OSError:
            return False
        self.raw += data.decode(errors="replace")
        return bool(data)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        os.close(self._keys)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    tests = Path(__file__).parent.parent
    environment = os.environ | {
        "PYTHONPATH": str(tests), "HOME": str(tmp_path), "XDG_STATE_HOME": str(tmp_path), "TERM": "xterm-256color",
        "PROMPT_TOOLKIT_NO_CPR": "1", "PYTHONIOENCODING": "utf-8",
    }  # fmt: skip
    environment.pop("NO_COLOR", None)
    (tmp_path / "menu.txt").write_text("soup of the day\n")
    started = Terminal([sys.executable, str(tests / "terminal" / "scripted_chat.py")], environment, tmp_path)
    yield started
    started.close()


def test_a_conversation(terminal: Terminal, tmp_path: Path) -> None:
    terminal.wait_for("no parameters")
    terminal.press("hello 世界 🎉\r")
    terminal.wait_for("You said hello 世界 🎉")
    terminal.wait_for("of 16,384 tokens")

    terminal.press("count slowly\r")
    terminal.wait_for(" 3 4 5")
    terminal.press("\x03")
    terminal.wait_for("stopped · ")
    assert terminal.process.poll() is None
    terminal.press("/context\r")
    terminal.wait_for("2 exchanges")

    terminal.press('"""two\rlines"""\r')
    terminal.wait_for("You said two\r\nlines")
    terminal.wait_for("of 16,384 tokens")

    terminal.press("/file menu.txt\r")
    terminal.wait_for("Attached menu.txt")
    terminal.press("/save talk.json\r")
    terminal.wait_for("Saved to talk.json")

    terminal.wait_for("❯ ")  # keys that come before the prompt stands are flushed
    terminal.press("not sent\x03")
    terminal.wait_for("Ctrl-C again")
    terminal.press("\x03")
    assert terminal.wait_for_end() == 0
    assert (tmp_path / "talk.json").is_file()
    assert "count slowly" in (tmp_path / "persimmon" / "chat_history").read_text()


def test_a_long_answer_comes_whole_and_in_colour(terminal: Terminal) -> None:
    terminal.wait_for("no parameters")
    terminal.press("something long\r")
    terminal.wait_for("100 tokens")
    assert [int(n) for n in re.findall(r"line (\d+)\r\n", terminal.shown)] == list(range(100))
    assert terminal.leave() == 0
    assert "38;5;202m" in terminal.raw
