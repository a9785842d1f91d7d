"""What this machine has: processor, memory, compiler. Torch-free; unknown facts are None or empty, never guessed."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

from persimmon.errors import InputError

# The instruction sets that matrix kernels care about, as Linux and macOS spell them.
_CPU_FEATURES = (
    "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_bf16",
    "amx_int8", "neon", "asimd", "asimddp", "bf16", "i8mm", "sve",
)  # fmt: skip


MAX_THREADS = 1024
"""More than any one machine of today has cores; tens of thousands make thread libraries crash."""


def check_threads(threads: int | None) -> None:
    """InputError for a number of threads that cannot be."""
    if threads is not None and not 1 <= threads <= MAX_THREADS:
        raise InputError(f"threads must be from 1 to {MAX_THREADS}, got {threads}")


def cpu_threads() -> int:
    """Threads this process may use (its affinity, where the system tells)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cpu_name() -> str | None:
    """The processor's own name."""
    for name, value in _key_values(Path("/proc/cpuinfo")):
        if name == "model name":
            return value
    return _sysctl("machdep.cpu.brand_string") or platform.processor() or None


def cpu_features() -> list[str]:
    """The vector instruction sets of the processor, in the order of this module's list."""
    flags: set[str] = set()
    for name, value in _key_values(Path("/proc/cpuinfo")):
        if name in ("flags", "Features"):
            flags = set(value.split())
            break
    else:
        flags = set(_sysctl("machdep.cpu.features", "machdep.cpu.leaf7_features").lower().split())
        if platform.machine() == "arm64":
            flags.add("neon")
    return [feature for feature in _CPU_FEATURES if feature in flags]


def memory_total() -> int | None:
    """Bytes of memory this process can hope for: the machine's, or its container's limit when that is lower."""
    installed = _meminfo("MemTotal") or _int(_sysctl("hw.memsize"))
    return _lowest(installed, _container_limit())


def memory_available() -> int | None:
    """Bytes that can be taken now without pushing others out; without that figure, the total."""
    limit, used = _container_limit(), _container_usage()
    inside = limit - used if limit is not None and used is not None else None
    return _lowest(_meminfo("MemAvailable"), inside) or memory_total()


def large_pages_offered() -> bool:
    """Whether Linux gives a process large pages when it asks for them (transparent huge pages)."""
    try:
        modes = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return False
    return "[never]" not in modes


def compiler() -> str | None:
    """First line of the C++ compiler's version, if there is a compiler."""
    for command in (os.environ.get("CXX", ""), "c++", "g++", "clang++"):
        path = shutil.which(command) if command else None
        if path:
            return _output(path, "--version").partition("\n")[0] or path
    return None


def size_text(num_bytes: int | None) -> str:
    """A number of bytes for people: `18.8 GB`, `39.2 MB`."""
    if num_bytes is None:
        return "unknown size"
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def _key_values(file: Path) -> Iterator[tuple[str, str]]:
    """`key : value` lines of a file in /proc; nothing where it does not exist."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        key, _, value = line.partition(":")
        yield key.strip(), value.strip()


def _meminfo(name: str) -> int | None:
    for key, value in _key_values(Path("/proc/meminfo")):
        if key == name:
            return int(value.split()[0]) * 1024  # the file counts KiB
    return None


def _container_limit() -> int | None:
    """Memory limit of the control group, version 2 or 1; version 1 writes a huge number for none."""
    limit = _cgroup("memory.max", "memory/memory.limit_in_bytes")
    return limit if limit is not None and limit < 1 << 60 else None


def _container_usage() -> int | None:
    return _cgroup("memory.current", "memory/memory.usage_in_bytes")


def _cgroup(*names: str) -> int | None:
    for name in names:
        file = Path("/sys/fs/cgroup") / name
        if file.is_file():
            return _int(file.read_text())
    return None


def _int(text: str) -> int | None:
    return int(text) if text.strip().isdigit() else None


def _lowest(*values: int | None) -> int | None:
    return min((value for value in values if value is not None), default=None)


def _sysctl(*names: str) -> str:
    return _output("sysctl", "-n", *names) if platform.system() == "Darwin" else ""


def _output(*command: str) -> str:
    """Standard output of a command; empty when it cannot run."""
    import subprocess  # a slow import, and `persimmon --help` imports this module

    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
