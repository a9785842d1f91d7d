"""Evil programs against every wall of this machine: contained, and nothing left behind."""

import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from persimmon.errors import InputError, UnavailableError
from persimmon.evals import sandbox, seccomp
from persimmon.evals.sandbox import ISOLATIONS, Limits, Sandbox, open_sandbox

LIMITS = Limits(wall_seconds=4, cpu_seconds=2, memory_bytes=256 << 20)

# Each program tries its attack; getting through prints ESCAPED. HOME, OUTSIDE (a directory of the test with the
# files `secret` and `writable`), PARENT (a process id) and PORT are defined in front of it.
EVIL = {
    "fork bomb": "while True:\n    if os.fork() >= 0: print('ESCAPED')",
    "fork by subprocess": "subprocess.run(['/bin/true']); print('ESCAPED')",
    "shell": "print('ESCAPED' if os.system('true') == 0 else '')",
    "replace itself": "os.execv('/bin/sh', ['sh', '-c', 'echo ESCAPED'])",
    "multiprocessing": "import multiprocessing\nmultiprocessing.Process(target=print).start(); print('ESCAPED')",
    "thread bomb": """
        threads = []
        try:
            while True:
                threads.append(threading.Thread(target=time.sleep, args=(60,), daemon=True)); threads[-1].start()
                if len(threads) > 200: raise SystemExit(print('ESCAPED'))
        except RuntimeError: pass
    """,
    "small-stack thread bomb": """
        threading.stack_size(32768)
        for i in range(2000):
            threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
        print('ESCAPED')
    """,
    "memory hog": "hog = [bytearray(16 << 20) for _ in range(64)]; print('ESCAPED')",
    "memory map hog": "import mmap\nhog = [mmap.mmap(-1, 64 << 20) for _ in range(16)]; print('ESCAPED')",
    "memory file": "os.memfd_create('hog'); print('ESCAPED')",
    "shared memory segment": "check(libc.shmget(0, 1 << 20, 0o1600)); print('ESCAPED')",
    "huge number": "print(len(str(9 ** 9 ** 9))); print('ESCAPED')",
    "endless loop": "while True: pass",
    "endless loop in many threads": """
        def spin():
            while True: pass
        for _ in range(8): threading.Thread(target=spin).start()
    """,
    "endless sleep": "time.sleep(10 ** 6)",
    "endless sleep without output": "os.close(1); os.close(2); time.sleep(10 ** 6)",
    "endless regular expression": "import re\nre.match('(a+)+$', 'a' * 64 + 'b'); print('ESCAPED')",
    "endless recursion": "sys.setrecursionlimit(10 ** 9)\ndef f(): return f()\nf()",
    "crash": "ctypes.string_at(0)",
    "abort": "os.abort()",
    "endless output": "while True: print('x' * 4096)",
    "endless error output": "while True: os.write(2, b'x' * 4096)",
    "binary output": "os.write(1, bytes(range(256)) * 64); os._exit(0)",
    "large file": "open('/tmp/large', 'wb').write(b'x' * (8 << 20)); print('ESCAPED')",
    "many files": """
        for i in range(64): open(f'/tmp/part{i}', 'wb').write(b'x' * (1 << 20))
        print('ESCAPED')
    """,
    "descriptor exhaustion": "files = [os.open('/dev/null', 0) for _ in range(512)]; print('ESCAPED')",
    "internet socket": "socket.create_connection(('127.0.0.1', PORT), 1); print('ESCAPED')",
    "datagram": "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 9)); print('ESCAPED')",
    "abstract socket": "socket.socket(socket.AF_UNIX).bind('\\0escape'); print('ESCAPED')",
    "netlink socket": "socket.socket(16, socket.SOCK_RAW, 0); print('ESCAPED')",
    "name look-up": "print(socket.getaddrinfo('example.org', 80)); print('ESCAPED')",
    "socket pair": "socket.socketpair(); print('ESCAPED')",
    "read outside": "print(open(OUTSIDE + '/secret').read())",
    "read home": "print('ESCAPED', os.listdir(HOME))",
    "read accounts": "print('ESCAPED', open('/etc/passwd').read())",
    "read by symbolic link": "os.symlink(OUTSIDE + '/secret', '/tmp/link'); print(open('/tmp/link').read())",
    "read by hard link": "os.link(OUTSIDE + '/secret', '/tmp/hard'); print(open('/tmp/hard').read())",
    "read by dots": "print(open('/tmp/../..' + OUTSIDE + '/secret').read())",
    "read by /proc/self/root": "print(open('/proc/self/root' + OUTSIDE + '/secret').read())",
    "read by the parent's root": "print(open(f'/proc/{PARENT}/root' + OUTSIDE + '/secret').read())",
    "read a parent's environment": "print('ESCAPED', open(f'/proc/{PARENT}/environ').read())",
    "read memory of the parent": "open(f'/proc/{PARENT}/mem', 'rb'); print('ESCAPED')",
    "read the disk": "open('/dev/vda', 'rb'); print('ESCAPED')",
    "own environment": "print('ESCAPED' if 'SANDBOX_CANARY' in os.environ else '')",
    "write outside": "open(OUTSIDE + '/writable', 'w').write('ESCAPED'); print('ESCAPED')",
    "create outside": "open(OUTSIDE + '/new', 'w'); print('ESCAPED')",
    "write home": "open(HOME + '/.escaped-from-sandbox', 'w'); print('ESCAPED')",
    "write the system": "open('/usr/escaped', 'w'); print('ESCAPED')",
    "write the root": "open('/escaped', 'w'); print('ESCAPED')",
    "delete outside": "os.unlink(OUTSIDE + '/writable'); print('ESCAPED')",
    "truncate outside": "os.truncate(OUTSIDE + '/writable', 0); print('ESCAPED')",
    "change mode outside": "os.chmod(OUTSIDE + '/writable', 0o600); print('ESCAPED')",
    "change times outside": "os.utime(OUTSIDE + '/writable', (0, 0)); print('ESCAPED')",
    "device node": "os.mknod('/tmp/disk', 0o60666, os.makedev(254, 0)); open('/tmp/disk', 'rb'); print('ESCAPED')",
    "kill the parent": "os.kill(PARENT, 9); print('ESCAPED')",
    "kill everything": "os.kill(-1, 9); print('ESCAPED')",
    "kill own group": "os.killpg(0, 9); print('ESCAPED')",
    "signal through a descriptor": "signal.pidfd_send_signal(os.pidfd_open(PARENT), 9); print('ESCAPED')",
    "signal by a pipe's owner": """
        import fcntl
        reading, writing = os.pipe()
        fcntl.fcntl(reading, fcntl.F_SETOWN, PARENT)
        fcntl.fcntl(reading, 10, 9)
        fcntl.fcntl(reading, fcntl.F_SETFL, fcntl.fcntl(reading, fcntl.F_GETFL) | os.O_ASYNC)
        os.write(writing, b'x'); print('ESCAPED')
    """,
    "signal by a pipe's extended owner": """
        import fcntl, struct
        fcntl.fcntl(os.pipe()[0], 15, struct.pack('ii', 1, PARENT)); print('ESCAPED')
    """,
    "kill signal for a pipe": "import fcntl\nfcntl.fcntl(os.pipe()[0], 10, 9); print('ESCAPED')",
    "outlive the evaluation": "check(libc.prctl(1, 0, 0, 0, 0)); print('ESCAPED')",
    "trace the parent": "check(libc.ptrace(16, PARENT, 0, 0)); print('ESCAPED')",
    "peek at the parent": "check(libc.process_vm_readv(PARENT, None, 0, None, 0, 0)); print('ESCAPED')",
    "limit the parent": "resource.prlimit(PARENT, resource.RLIMIT_CPU, (1, 1)); print('ESCAPED')",
    "raise own limits": "resource.setrlimit(resource.RLIMIT_AS, (-1, -1)); print('ESCAPED')",
    "ignore signals": """
        for number in range(1, 65):
            try: signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError): pass
        while True: pass
    """,
    "survive the CPU limit": "signal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass",
    "new session": "os.setsid()\nwhile True: time.sleep(1)",
    "unshare": "check(libc.unshare(0x10000000)); print('ESCAPED')",
    "clone into a namespace": "check(libc.syscall(56, 0x10000000 | 17, 0, 0, 0, 0)); print('ESCAPED')",
    "new-style clone": "check(libc.syscall(435, (ctypes.c_uint64 * 11)(), 88)); print('ESCAPED')",
    "mount": "check(libc.mount(b'none', b'/tmp', b'tmpfs', 0, None)); print('ESCAPED')",
    "change root": "os.chroot('/tmp'); print('ESCAPED')",
    "become root": "os.setuid(0); print('ESCAPED')",
    "x32 system call": "check(libc.syscall(0x40000000 + 39)); print('ESCAPED')",
    "unknown system call": "check(libc.syscall(1000)); print('ESCAPED')",
    "load a kernel module": "check(libc.syscall(175, None, 0, None)); print('ESCAPED')",
    "io_uring": "check(libc.syscall(425, 8, (ctypes.c_uint8 * 256)())); print('ESCAPED')",
    "bpf": "check(libc.syscall(321, 0, None, 0)); print('ESCAPED')",
    "keyring": "check(libc.syscall(250, 0, -3, 0)); print('ESCAPED')",
    "terminal injection": "import fcntl\nfcntl.ioctl(0, 0x5412, b'x'); print('ESCAPED')",
    "leaked descriptors": """
        for descriptor in range(3, 4096):
            try: data = os.fstat(descriptor)
            except OSError: continue
            import stat
            if not stat.S_ISFIFO(data.st_mode): print('ESCAPED', descriptor, data)
        raise SystemExit
    """,
    "flood every descriptor": """
        for descriptor in range(3, 64):
            try: os.set_blocking(descriptor, False); os.write(descriptor, b'passed ' * 100_000)
            except OSError: pass
        while True: time.sleep(1)
    """,
    "leave early as if well": "os._exit(0)",
    "leave early politely": "sys.exit(0)",
    "leave at exit": "import atexit\natexit.register(os._exit, 0)\nraise SystemExit",
    "bad syntax": "def (:",
    "deeply nested source": "x = " + "(" * 100_000 + ")" * 100_000,
}
PRELUDE = """
import ctypes, os, resource, signal, socket, subprocess, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
def check(result):
    if result < 0: raise OSError(ctypes.get_errno(), 'refused')
"""


@pytest.fixture(scope="module", params=ISOLATIONS)
def box(request: pytest.FixtureRequest) -> Sandbox:
    try:
        return open_sandbox(request.param, LIMITS)
    except UnavailableError as error:
        pytest.skip(str(error))


_EARLIER: set[int] = set()
"""Processes that tests of other files left running, such as Python's own resource tracker."""


@pytest.fixture(scope="module", autouse=True)
def earlier_processes() -> None:
    _EARLIER.update(children())


def children() -> set[int]:
    """Ids of all processes below this one, but for earlier ones."""
    found: set[int] = set()
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    front = {os.getpid()}
    while front:
        front = {pid for pid, parent in parents.items() if parent in front} - found
        found |= front
    return found - _EARLIER


def attack(box: Sandbox, name: str, outside: Path) -> sandbox.Verdict:
    """Run one evil program with a directory of its own to go for."""
    outside.mkdir()
    outside.chmod(0o755)
    (outside / "secret").write_text("ESCAPED")
    (outside / "writable").write_text("untouched")
    (outside / "writable").chmod(0o666)
    names = f"HOME, OUTSIDE, PARENT, PORT = {str(Path.home())!r}, {str(outside)!r}, {os.getpid()}, 1\n"
    return box.run(PRELUDE + names + textwrap.dedent(EVIL[name]))


@pytest.fixture(scope="module")
def attacked(box: Sandbox) -> Iterator[dict[str, tuple[sandbox.Verdict, Path]]]:
    """All evil programs, several at a time, as an evaluation would run them."""
    os.environ["SANDBOX_CANARY"] = "ESCAPED"
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor(6) as pool:
        os.chmod(directory, 0o755)
        places = {name: Path(directory, str(index)) for index, name in enumerate(EVIL)}
        verdicts = pool.map(lambda name: attack(box, name, places[name]), EVIL)
        yield {name: (verdict, places[name]) for name, verdict in zip(EVIL, verdicts, strict=True)}
    del os.environ["SANDBOX_CANARY"]


X86_64_NUMBERS = {"clone into a namespace", "load a kernel module", "bpf", "keyring"}
HARMLESS = {"thread bomb", "shell", "own environment"}  # their attack fails without an exception


@pytest.mark.parametrize("name", EVIL)
def test_evil_program_is_contained(attacked: dict[str, tuple[sandbox.Verdict, Path]], name: str) -> None:
    if name in X86_64_NUMBERS and platform.machine() != "x86_64":
        pytest.skip("the program's system-call number is that of x86_64")
    verdict, outside = attacked[name]
    assert verdict.passed == (name in HARMLESS), verdict
    assert "ESCAPED" not in verdict.output
    assert len(verdict.output) <= LIMITS.output_bytes
    assert verdict.seconds < LIMITS.wall_seconds + 5
    assert sorted(path.name for path in outside.iterdir()) == ["secret", "writable"]
    assert (outside / "writable").read_text() == "untouched"
    assert (outside / "writable").stat().st_mode & 0o777 == 0o666


def test_nothing_is_left_and_the_evaluation_goes_on(
    box: Sandbox, attacked: dict[str, tuple[sandbox.Verdict, Path]]
) -> None:
    assert len(attacked) >= 25
    for path in (Path.home() / ".escaped-from-sandbox", Path("/usr/escaped"), Path("/escaped")):
        assert not path.exists()
    deadline = time.monotonic() + 3
    while children() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not children()
    assert box.run("print(1 + 1)").output == "2\n"


def test_verdicts(box: Sandbox) -> None:
    assert box.run("print('fine')").passed
    assert box.run("raise ValueError('no good')").detail == "ValueError: no good"
    assert box.run("import sys; sys.exit(0)").status == "exited"
    assert box.run("import os; os._exit(0)").status == "exited"
    assert box.run("x = bytearray(10 ** 9)").status == "out of memory"
    assert box.run("import ctypes; ctypes.string_at(0)").status == "killed"
    assert box.run("while True: print('x' * 1000)").status == "output limit"
    quick = Sandbox(box.isolation, Limits(wall_seconds=1))
    assert quick.run("import time; time.sleep(60)").status == "timed out"
    assert Sandbox(box.isolation, Limits(cpu_seconds=1, wall_seconds=120)).run("while True: pass").status == "killed"


def test_ordinary_programs_run(box: Sandbox) -> None:
    verdict = box.run("import math, re, collections, itertools, hashlib, json, random, heapq, typing; print(math.pi)")
    assert verdict.passed and verdict.output.startswith("3.14")


def test_each_program_has_its_own_small_tmp(box: Sandbox) -> None:
    if box.isolation != "bubblewrap":
        pytest.skip("nothing is writable behind this wall")
    assert box.run("open('/tmp/note', 'w').write('x'); assert open('/tmp/note').read() == 'x'").passed
    assert box.run("import os; assert os.listdir('/tmp') == []").passed


def test_programs_run_side_by_side(box: Sandbox) -> None:
    with ThreadPoolExecutor(4) as pool:
        verdicts = list(pool.map(box.run, [f"assert {i} % 2 == 0" for i in range(8)]))
    assert [verdict.passed for verdict in verdicts] == [True, False] * 4


def test_killing_the_evaluation_ends_the_program(box: Sandbox) -> None:
    script = (
        "from persimmon.evals.sandbox import Limits, Sandbox\n"
        f"Sandbox({box.isolation!r}, Limits(wall_seconds=60)).run('import time; print(1); time.sleep(50)')\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 10
    while len(children()) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    below = children() - {process.pid}
    assert below
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 5
    alive = below
    while alive and time.monotonic() < deadline:
        time.sleep(0.02)
        alive = {pid for pid in below if _runs(pid)}
    assert not alive


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_refuses_with_the_reason_where_it_cannot_protect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_platform_problem", lambda name: f"{name} is not here")
    with pytest.raises(UnavailableError, match=r"bubblewrap: bubblewrap is not here; landlock: landlock is not here"):
        open_sandbox()


def test_refuses_a_wall_that_lets_something_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_ATTACK", "raise SystemExit(print('allowed: everything'))")
    for isolation in ISOLATIONS:
        with pytest.raises(UnavailableError):
            open_sandbox(isolation)


def test_a_failing_wall_is_not_taken_for_a_failing_program(monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("bwrap") is None:
        pytest.skip("bwrap is not installed")
    box = Sandbox("bubblewrap", LIMITS)
    monkeypatch.setattr(box, "_wall", lambda: [shutil.which("bwrap") or "", "--no-such-option"])
    with pytest.raises(UnavailableError, match="no-such-option"):
        box.run("pass")


def test_unknown_isolation() -> None:
    with pytest.raises(InputError, match="'docker'"):
        open_sandbox("docker")  # type: ignore[arg-type]


def test_without_a_wall_only_by_name() -> None:
    try:
        box = open_sandbox("none", LIMITS)
    except UnavailableError as error:
        pytest.skip(str(error))
    assert box.run("import os\ntry: os.fork()\nexcept PermissionError: pass\nelse: raise SystemExit").passed


@pytest.mark.parametrize("isolation", ["landlock", "none"])
def test_the_filter_alone_keeps_a_program_from_signalling_by_a_pipe(isolation: sandbox.Isolation) -> None:
    """Same user, and no scope of signals: Landlock has one from its version 6 on only."""
    script = (
        "import os, subprocess, sys\n"
        "from persimmon.evals.sandbox import Sandbox\n"
        f"box = Sandbox({isolation!r})\n"
        "old = 'Landlock is not available\")'\n"
        "box._child = box._child.replace(old, old + '; version = min(version, 4)', 1)\n"
        "os.setgroups([]); os.setresgid(1000, 1000, 1000); os.setresuid(1000, 1000, 1000)\n"
        "victim = subprocess.Popen(['sleep', '60'])\n"
        "verdict = box.run(f'PARENT = {victim.pid}\\n' + sys.stdin.read())\n"
        "victim.kill()\n"
        "print(verdict.detail if verdict.status == 'failed' else verdict, victim.wait())\n"
    )
    if os.geteuid() != 0:
        script = script.replace("os.setgroups([]); os.setresgid(1000, 1000, 1000); os.setresuid(1000, 1000, 1000)", "")
    program = PRELUDE + textwrap.dedent(EVIL["signal by a pipe's owner"])
    done = subprocess.run([sys.executable, "-c", script], input=program, capture_output=True, text=True, timeout=60)
    if "Landlock" in done.stderr and "Unavailable" in done.stderr:
        pytest.skip("no Landlock here")
    assert done.stdout.startswith("PermissionError"), done.stdout + done.stderr


def test_table_of_system_calls_agrees_with_the_headers() -> None:
    header = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")
    if not header.exists():
        pytest.skip("kernel headers are not installed")
    numbers = dict(line.split()[1:3] for line in header.read_text().splitlines() if line.startswith("#define __NR_"))
    calls = seccomp.DENIED | {name: known[0] for name, known in seccomp.DENIED_COMMANDS.items()}
    for name, (number, _) in calls.items():
        if f"__NR_{name}" in numbers:
            assert int(numbers[f"__NR_{name}"]) == number, name


@pytest.mark.parametrize("machine", seccomp.ARCHITECTURES)
def test_filter_is_whole_instructions_and_not_too_long(machine: str) -> None:
    program = seccomp.assemble(machine)
    assert len(program) % 8 == 0 and len(program) // 8 <= 4096
