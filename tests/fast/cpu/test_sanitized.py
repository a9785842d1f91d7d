"""The tests of kernels, decoder and prompt files under the sanitizers, in every instruction set of this machine.

Address and undefined behaviour are checked.

The extension is built once more into a folder of its own (kept, so that a second run builds nothing). The sanitizers
must be in the process before Python's first allocation, so the tests run in a process that preloads them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
BUILD = ROOT / "build" / "sanitized"
TESTS = [
    f"tests/fast/cpu/test_{name}.py"
    for name in (
        "row_kernels", "sparse_mlp_kernels", "sketch_kernels", "attention_kernels", "packing_kernels",
        "fingerprint_kernel", "planes", "decoder",
    )
] + ["tests/infer/test_prompt_file.py", "tests/train/test_kernels.py", "tests/train/test_products.py"]  # fmt: skip

# Python and torch keep memory until they end, which is no leak of ours. Without -s the report would be lost.
SANITIZER_OPTIONS = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}


def tool(name: str) -> str:
    found = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def runtime(compiler: str, library: str) -> str:
    """Path of one of the compiler's own libraries."""
    path = subprocess.run(
        [compiler, f"-print-file-name={library}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(path).is_absolute():
        pytest.skip(f"the compiler has no {library}")
    return path


@pytest.fixture(scope="module")
def preloaded() -> str:
    compiler = tool("g++")
    # libstdc++ too: without it the first C++ exception ends the process.
    return ":".join(runtime(compiler, library) for library in ("libasan.so", "libstdc++.so.6"))


@pytest.fixture(scope="module")
def extension(preloaded: str) -> Path:
    pytest.importorskip("nanobind", reason="nanobind is not installed, so nothing can be built")
    cmake = tool("cmake")
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    options = ["-DPERSIMMON_SANITIZE=ON", f"-DPython_EXECUTABLE={sys.executable}"]
    for command in (
        [cmake, "-S", str(ROOT), "-B", str(BUILD), *generator, *options],
        [cmake, "--build", str(BUILD), "--parallel", str(os.cpu_count() or 1)],
    ):
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
    (built,) = BUILD.glob("_native*.so")
    return built


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.skipif(
    not os.environ.get("PERSIMMON_TEST_SANITIZED"), reason="builds for minutes: .ci/run sets PERSIMMON_TEST_SANITIZED=1"
)
def test_the_extension_is_clean(extension: Path, preloaded: str) -> None:
    environment = {
        **os.environ,
        **SANITIZER_OPTIONS,
        "LD_PRELOAD": preloaded,
        "PERSIMMON_SANITIZED_NATIVE": str(extension),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-p", "sanitized_native", "-p", "no:cacheprovider", *TESTS]
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), environment.get("PYTHONPATH", "")])
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    assert " passed" in result.stdout
