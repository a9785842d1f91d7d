"""What the sandbox runs first inside: give up every right, then run the untrusted program in this very process.

The text of this file is handed to a bare interpreter (`python -I -S -c`), so it uses the standard library alone. It
reads one JSON object from standard input: `limits` (resource name -> value), `filter` (hexadecimal BPF), `uid` (to
change to, when started by root), `readable` (directories, when Landlock has to confine), `parent_death` (die with the
parent process), `program`, and `token`, which it writes to the descriptor `result` once the program has run to its
end. A program that exits early, however it does it, therefore never counts as passed.
"""

import ctypes
import json
import os
import resource
import signal
import sys
from typing import Any

libc = ctypes.CDLL(None, use_errno=True)

SET_NO_NEW_PRIVILEGES, SET_SECCOMP, SECCOMP_FILTER, SET_DEATH_SIGNAL, SET_DUMPABLE = 38, 22, 2, 1, 4
EXITED, OUT_OF_MEMORY = 3, 4  # exit codes, as in sandbox.py
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # Landlock, the same numbers on every machine


def call(result: int, what: str) -> int:
    """Stop, before anything untrusted runs, when a protection could not be put in place."""
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def confine_files(readable: list[str]) -> None:
    """Landlock: nothing but reading below `readable` and a few harmless devices; no TCP, no signals to outside."""
    version = call(libc.syscall(CREATE_RULESET, None, 0, 1), "Landlock is not available")
    if version < 3:
        raise OSError(f"Landlock version {version} cannot forbid truncating files; 3 (Linux 6.2) is needed")
    rights = (1 << (16 if version >= 5 else 15)) - 1
    network = 3 if version >= 4 else 0
    scopes = 3 if version >= 6 else 0
    attributes = (ctypes.c_uint64 * 3)(rights, network, scopes)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    ruleset = call(libc.syscall(CREATE_RULESET, attributes, size, 0), "Landlock ruleset")
    read_tree = 1 << 0 | 1 << 2 | 1 << 3  # execute (for libraries), read files, list directories
    read, write = 1 << 2, 1 << 1
    paths = dict.fromkeys(readable, read_tree)
    paths.update({"/dev/null": read | write, "/dev/urandom": read, "/dev/zero": read})
    for path, allowed in paths.items():
        if not os.path.exists(path):
            continue
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)

        class Rule(ctypes.Structure):
            _pack_ = 1
            _fields_ = [("allowed", ctypes.c_uint64), ("handle", ctypes.c_int32)]

        call(libc.syscall(ADD_RULE, ruleset, 1, ctypes.byref(Rule(allowed, handle)), 0), f"Landlock rule for {path}")
        os.close(handle)
    call(libc.syscall(RESTRICT_SELF, ruleset, 0), "Landlock")
    os.close(ruleset)


def drop_privileges(uid: int | None) -> None:
    """Become another user, when root, and lose every capability."""
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    call(libc.capset(header, (ctypes.c_uint32 * 6)()), "capabilities")


def install_filter(program: bytes) -> None:
    """Load the system-call filter; nothing can take it off again."""

    class Filter(ctypes.Structure):
        _fields_ = [("length", ctypes.c_uint16), ("instructions", ctypes.c_char_p)]

    call(libc.prctl(SET_SECCOMP, SECCOMP_FILTER, ctypes.byref(Filter(len(program) // 8, program)), 0, 0), "seccomp")


def protect(spec: dict[str, Any]) -> None:
    """All layers, outermost first; an error in any of them ends the process before the program is looked at."""
    for name, value in spec["limits"].items():
        kind = getattr(resource, name)
        resource.setrlimit(kind, (value, value))
    call(libc.prctl(SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0), "no new privileges")
    drop_privileges(spec["uid"])
    if spec["parent_death"]:  # after the change of user, which would undo it
        call(libc.prctl(SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0), "death signal")
    if spec["readable"] is not None:
        confine_files(spec["readable"])
    call(libc.prctl(SET_DUMPABLE, 0, 0, 0, 0), "no dumps")
    os.closerange(3, spec["result"])
    os.closerange(spec["result"] + 1, 4096)
    install_filter(bytes.fromhex(spec["filter"]))


def main() -> None:
    """Read the specification, protect, run, report."""
    spec = json.loads(sys.stdin.buffer.read())
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    protect(spec)
    result, token = spec["result"], spec["token"].encode()
    os.write(result, b"ready ")
    try:
        exec(compile(spec.pop("program"), "<program>", "exec"), {"__name__": "__main__"})
    except SystemExit:
        os._exit(EXITED)
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
    sys.stdout.flush()
    os.write(result, token)
    os._exit(0)  # without waiting for threads that the program left behind


main()
