"""Run generated Python programs without trusting them.

One policy, two outer walls. The policy (sandbox_child.py, seccomp.py): a single process that cannot fork, execute,
signal, open a socket or change file metadata, with no capabilities, under limits of memory, CPU time, threads, file
size and open files; its output is read up to a cap and the wall clock ends it. The outer wall is

* `bubblewrap`: an empty file system of its own (the interpreter's directories read-only, a small writable /tmp in
  memory), with its own process, network, IPC and user or mount namespaces; or, where that is not to be had,
* `landlock`: the kernel forbids every file but the interpreter's directories; no place is writable.

`open_sandbox` attacks the wall itself before it trusts it, and refuses (UnavailableError, with the reasons) where
neither holds. `isolation="none"` keeps the policy without a wall, so that files can be read and written, and has to be
asked for by name.

Not covered: flaws of the kernel; information in timing, load or `uname`; under Landlock, the existence and metadata of
files. Nor does the verdict withstand a program built to forge it: it runs in the process that tests it, so one that
searches the interpreter for the secret token can claim to have passed. Programs that legitimately start other
processes, use sockets or need packages beyond the standard library fail.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from persimmon.errors import InputError, UnavailableError
from persimmon.evals import seccomp

Isolation = Literal["auto", "bubblewrap", "landlock", "none"]
ISOLATIONS: tuple[Isolation, ...] = ("bubblewrap", "landlock")
"""The walls in order of preference."""

Status = Literal["passed", "failed", "exited", "out of memory", "killed", "timed out", "output limit"]

_CHILD = Path(__file__).with_name("sandbox_child.py")
_EXIT_CODES: dict[int, Status] = {3: "exited", 4: "out of memory"}


@dataclass(frozen=True)
class Limits:
    """What one program may use."""

    wall_seconds: float = 10.0
    """From start to end, whatever it does."""

    cpu_seconds: int = 10
    """Of all its threads together."""

    memory_bytes: int = 512 << 20
    """Address space; as there is one process, also its total."""

    file_bytes: int = 1 << 20
    """Largest file it may write."""

    disk_bytes: int = 16 << 20
    """All of its /tmp together (bubblewrap; under Landlock nothing is writable)."""

    open_files: int = 32
    """Descriptors at a time."""

    threads: int = 32
    """At a time. Not enforced for `isolation="none"` as root, where the memory limit has to do."""

    output_bytes: int = 64 << 10
    """Standard output and error together; a program that writes more is ended."""


@dataclass(frozen=True)
class Verdict:
    """How a program ended."""

    status: Status
    """`passed` only when it ran to its end without an exception."""

    detail: str
    """The last line of its output, usually the exception; empty when it said nothing."""

    output: str
    """Standard output and error, up to the cap."""

    seconds: float
    """Wall-clock time."""

    @property
    def passed(self) -> bool:
        """Whether the program ran to its end without an exception."""
        return self.status == "passed"


class Sandbox:
    """Runs programs behind one wall. Safe to use from several threads."""

    def __init__(self, isolation: Isolation, limits: Limits | None = None) -> None:
        """No checks are made here: use `open_sandbox`."""
        self.isolation = isolation
        self.limits = limits or Limits()
        self._interpreter, self._readable = _interpreter()
        self._child = _CHILD.read_text()
        self._filter = seccomp.assemble(platform.machine()).hex()

    def run(self, program: str) -> Verdict:
        """Run `program` as a script and say how it ended. Raises UnavailableError when the wall could not be put up."""
        start = time.monotonic()
        result_read, result_write = os.pipe()
        token = secrets.token_hex(16)
        spec = self._specification(program, token, result_write)
        try:
            process = subprocess.Popen(
                self._command(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(result_write,),
                start_new_session=True,
                cwd="/",
                env={},
            )
            os.close(result_write)
            output, stopped = _converse(process, spec, start + self.limits.wall_seconds, self.limits.output_bytes)
            # The pipe's buffer holds any honest message; a program that filled it or kept it open is not waited for.
            os.set_blocking(result_read, False)
            try:
                said = os.read(result_read, 256).decode(errors="replace")
            except BlockingIOError:
                said = ""
        finally:
            os.close(result_read)
        if not said.startswith("ready ") and stopped is None:
            raise UnavailableError(f"{self.isolation} sandbox: {_last_line(output) or 'the child did not start'}")
        status = stopped or _status(process.returncode, said == f"ready {token}")
        return Verdict(status, _last_line(output), output, time.monotonic() - start)

    def _specification(self, program: str, token: str, result: int) -> bytes:
        limits = self.limits
        spec = {
            "limits": {
                "RLIMIT_AS": limits.memory_bytes,
                "RLIMIT_CPU": limits.cpu_seconds,
                "RLIMIT_FSIZE": limits.file_bytes,
                "RLIMIT_NOFILE": max(limits.open_files, result + 8),
                "RLIMIT_NPROC": limits.threads,
                "RLIMIT_CORE": 0,
                "RLIMIT_MEMLOCK": 0,
                "RLIMIT_MSGQUEUE": 0,
                "RLIMIT_SIGPENDING": 64,
            },
            "filter": self._filter,
            # A user id of its own for each run, so that the limit of threads counts no one else's.
            "uid": 60_600 + secrets.randbelow(580) if os.geteuid() == 0 and self.isolation != "none" else None,
            "readable": self._readable if self.isolation == "landlock" else None,
            "parent_death": self.isolation != "bubblewrap",
            "result": result,
            "token": token,
            "program": program,
        }
        return json.dumps(spec).encode()

    def _command(self) -> list[str]:
        python = [self._interpreter, "-I", "-S", "-B", "-X", "utf8", "-c", self._child]
        return [*self._wall(), *python] if self.isolation == "bubblewrap" else python

    def _wall(self) -> list[str]:
        """The bubblewrap command: everything unshared, almost nothing visible."""
        options = [
            "bwrap",
            "--unshare-all",
            "--die-with-parent",
            "--new-session",
            "--clearenv",
            "--hostname",
            "sandbox",
        ]
        options[0] = shutil.which("bwrap") or "bwrap"
        if os.geteuid() == 0:
            # Root needs no user namespace; the child changes to an unused user id and drops these again.
            options.remove("--unshare-all")
            options += ["--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
            options += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
        else:
            options += ["--unshare-user", "--uid", "65534", "--gid", "65534", "--disable-userns", "--cap-drop", "ALL"]
        for path in self._readable:
            options += ["--symlink", os.readlink(path), path] if os.path.islink(path) else ["--ro-bind", path, path]
        for device in ("/dev/null", "/dev/zero", "/dev/urandom"):
            options += ["--dev-bind", device, device]
        options += ["--perms", "1777", "--size", str(self.limits.disk_bytes), "--tmpfs", "/tmp"]
        return [*options, "--remount-ro", "/", "--chdir", "/tmp", "--"]


def open_sandbox(isolation: Isolation = "auto", limits: Limits | None = None) -> Sandbox:
    """The best sandbox of this machine, or the one named, after it withstood a test attack.

    Raises:
        UnavailableError: none can protect here; the text gives the reason for each.
        InputError: an unknown isolation.
    """
    if isolation not in ("auto", "none", *ISOLATIONS):
        raise InputError(f"isolation must be auto, {', '.join(ISOLATIONS)} or none, got {isolation!r}")
    reasons = []
    for name in ISOLATIONS if isolation == "auto" else (isolation,):
        reason = _platform_problem(name)
        if reason is None:
            sandbox = Sandbox(name, limits)
            reason = None if name == "none" else _weakness(sandbox)
            if reason is None:
                return sandbox
        reasons.append(f"{name}: {reason}")
    raise UnavailableError(f"generated code cannot be run safely here ({'; '.join(reasons)})")


def _platform_problem(isolation: Isolation) -> str | None:
    """Why this wall cannot even be tried, or None."""
    if sys.platform != "linux":
        return f"needs Linux, this is {sys.platform}"
    if platform.machine() not in seccomp.ARCHITECTURES:
        return f"no system-call table for {platform.machine()}"
    if isolation == "bubblewrap" and shutil.which("bwrap") is None:
        return "the program bwrap is not installed (package bubblewrap)"
    return None


_ATTACK = """
import fcntl, os, socket

def attempt(name, action):
    try:
        action()
    except OSError:
        return
    raise SystemExit(print("allowed:", name))

attempt("opening a network socket", lambda: socket.socket())
attempt("opening a local socket", lambda: socket.socket(socket.AF_UNIX))
attempt("starting a process", os.fork)
attempt("executing a program", lambda: os.execv("/bin/sh", ["sh"]))
attempt("signalling the parent process", lambda: os.kill(os.getppid(), 0))
attempt("choosing whom a pipe signals", lambda: fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, os.getpid()))
attempt("choosing with what a pipe signals", lambda: fcntl.fcntl(os.pipe()[0], 10, 0))
attempt("writing to the file system", lambda: open(TARGET, "w"))
attempt("reading a private file", lambda: open(SECRET).read())
attempt("listing a private directory", lambda: os.listdir(os.path.dirname(SECRET)))
"""


def _weakness(sandbox: Sandbox) -> str | None:
    """Attack the sandbox with a file made for the purpose; what was possible, or None."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)  # so that nothing but the wall is in the way
        secret, target = Path(directory, "secret"), Path(directory, "target")
        secret.write_text("secret")
        try:
            verdict = sandbox.run(f"SECRET, TARGET = {str(secret)!r}, {str(target)!r}\n{_ATTACK}")
        except (UnavailableError, OSError) as error:
            return str(error)
    return None if verdict.passed else f"its self-test {verdict.status}: {verdict.detail}"


def _interpreter() -> tuple[str, list[str]]:
    """A Python to run programs with, and the directories it needs to read.

    Under root the child becomes another user, so that an interpreter in a private directory (a version manager in
    root's home) cannot be used; then the system's serves.
    """
    python = os.path.realpath(sys.executable)
    system = [path for path in ("/usr", "/lib", "/lib32", "/lib64", "/bin") if os.path.exists(path)]
    if os.geteuid() == 0 and not _open_to_all(python):
        python = shutil.which("python3", path="/usr/local/bin:/usr/bin") or python
        return os.path.realpath(python), system
    prefix = os.path.realpath(sys.base_prefix)
    return python, system if Path(prefix).is_relative_to("/usr") else [*system, prefix]


def _open_to_all(path: str) -> bool:
    """Whether any user can reach `path`."""
    return all(parent.stat().st_mode & 0o001 for parent in Path(path).parents)


def _converse(
    process: subprocess.Popen[bytes], spec: bytes, deadline: float, output_bytes: int
) -> tuple[str, Status | None]:
    """Send the specification and read the output until the process ends, says too much or runs out of time."""
    assert process.stdin is not None and process.stdout is not None
    stopped: Status | None = None
    output = b""
    pending = memoryview(spec)
    with selectors.DefaultSelector() as selector:
        for pipe in (process.stdin, process.stdout):
            os.set_blocking(pipe.fileno(), False)
        selector.register(process.stdin, selectors.EVENT_WRITE)
        selector.register(process.stdout, selectors.EVENT_READ)
        while selector.get_map() and stopped is None:
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            for key, _ in ready:
                if key.fileobj is process.stdin:
                    pending = _send(selector, process.stdin, pending)
                    continue
                data = os.read(process.stdout.fileno(), 65_536)
                output += data
                if not data:
                    selector.unregister(process.stdout)
                elif len(output) > output_bytes:
                    stopped = "output limit"
            if stopped is None and time.monotonic() >= deadline:
                stopped = "timed out"
    if stopped is None:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:  # it closed its output and goes on
            stopped = "timed out"
    _end(process)
    return output[:output_bytes].decode(errors="replace"), stopped


def _send(selector: selectors.BaseSelector, pipe: object, pending: memoryview) -> memoryview:
    """Write what the pipe takes; close it when all is sent or nobody reads."""
    try:
        pending = pending[os.write(pipe.fileno(), pending) :]  # type: ignore[attr-defined]
    except BrokenPipeError:
        pending = pending[:0]
    if not pending:
        selector.unregister(pipe)  # type: ignore[arg-type]
        pipe.close()  # type: ignore[attr-defined]
    return pending


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill whatever is left of the process and its group, and collect it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for pipe in (process.stdin, process.stdout):
        if pipe is not None and not pipe.closed:
            pipe.close()
    process.wait()


def _status(returncode: int, finished: bool) -> Status:
    """The verdict on a process that ended by itself. Under bubblewrap a signal shows as 128 + its number."""
    if finished and returncode == 0:
        return "passed"
    if returncode < 0 or returncode > 128:
        return "killed"
    return _EXIT_CODES.get(returncode, "exited" if returncode == 0 else "failed")


def _last_line(output: str) -> str:
    lines = output.strip().splitlines()
    return lines[-1].strip()[:500] if lines else ""
