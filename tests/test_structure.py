"""README, docs, command-line help and code say the same."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from persimmon.cli.main import VERBS
from persimmon.config import PRESETS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def tracked_files() -> list[str]:
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return listing.stdout.split()


def test_the_tree_in_the_readme_is_the_tree() -> None:
    block = re.search(r"```text\n(src/persimmon/\n.*?)```", README, re.DOTALL)
    assert block, "README has no tree of src/persimmon"
    named = {line.split()[0].rstrip("/") for line in block[1].splitlines()[1:] if line.strip()}
    actual = {
        path.name for path in (ROOT / "src/persimmon").iterdir() if path.name not in ("__pycache__", "py.typed")
    } - {"__init__.py"}
    assert named == actual


def test_every_file_that_docs_name_exists() -> None:
    pattern = re.compile(r"`((?:src|docs|tests|configs|benchmarks)/[\w./-]+\.\w+|\w+/\w+\.py)`")
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for name in pattern.findall(page.read_text()):
            found = (ROOT / name).exists() or (ROOT / "src/persimmon" / name).exists() or "megatron" in name
            assert found, f"{page.name} names {name}, which does not exist"


def test_every_verb_is_documented_and_helps() -> None:
    docs = README + "".join(page.read_text() for page in (ROOT / "docs").glob("*.md"))
    for verb in VERBS:
        assert f"persimmon {verb}" in docs, f"no page shows `persimmon {verb}`"


@pytest.mark.parametrize("verb", [[], *([name] for name in VERBS)], ids=lambda v: " ".join(v) or "persimmon")
def test_help_is_light_and_complete(verb: list[str]) -> None:
    program = "import sys; from persimmon.cli.main import main; code = main(sys.argv[1:]); "
    program += "assert 'torch' not in sys.modules; raise SystemExit(code)"
    result = subprocess.run([sys.executable, "-c", program, *verb, "--help"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    if not verb:
        assert all(name in result.stdout for name in VERBS)


def test_presets_are_the_documented_ones() -> None:
    assert list(PRESETS) == ["test", "mini", "125m", "1b", "8b"]
    for name, config in PRESETS.items():
        assert config.max_positions == 16_384 and config.qk_layernorm, name
        assert config.partial_rotary_factor == 0.5 and config.rotary_base == 25_000.0, name


def test_torch_is_pinned_and_installed_first() -> None:
    pins = (ROOT / "constraints.txt").read_text().split()
    assert "torch==2.13.0" in pins
    assert all("==" in pin for pin in pins)


def test_no_unsafe_loading() -> None:
    for path in sorted((ROOT / "src").rglob("*.py")):
        text = path.read_text()
        assert "trust_remote_code" not in text, path
        for call in re.findall(r"torch\.load\([^)]*\)", text):
            assert "weights_only=True" in call, path


def test_the_repository_speaks_of_the_project_alone() -> None:
    forbidden = re.compile(r"/wo" + r"rk/|/ro" + r"ot/|pypi\.o" + r"rg|pythonhos" + r"ted|registry\.npm" + r"js")
    for name in tracked_files():
        path = ROOT / name
        if path.suffix in {".safetensors", ".model", ".png", ".gz"} or not path.is_file():
            continue
        match = forbidden.search(path.read_text(errors="ignore"))
        assert not match, f"{name}: {match and match[0]}"
