"""Machines without a GPU: nothing imports triton or CUDA, and what is missing is said."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch

from persimmon import engines
from persimmon.config import preset
from persimmon.errors import UnavailableError
from persimmon.fast.cuda import available
from persimmon.fast.cuda.available import why_unfit

PROGRAM = """
import sys
import persimmon, persimmon.api, persimmon.engines, persimmon.cli.main, persimmon.cli.info, persimmon.cli.doctor
assert "torch" in sys.modules  # by api; what follows adds nothing of a GPU
import persimmon.fast.cuda.plan, persimmon.fast.cuda.choice, persimmon.fast.cuda.available, persimmon.fast.cuda.layouts
from persimmon.engines import installed_engines, missing_engines
installed_engines(), missing_engines()
print(sorted(name for name in sys.modules if name.split(".")[0] == "triton"))
print("torch.cuda initialized:", sys.modules["torch"].cuda.is_initialized() if "torch" in sys.modules else False)
"""


def test_nothing_imports_triton_or_starts_cuda() -> None:
    result = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == ["[]", "torch.cuda initialized: False"]


def test_planning_needs_no_torch() -> None:
    program = "import sys, persimmon.fast.cuda.plan, persimmon.fast.cuda.choice; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_the_engine_says_what_is_missing() -> None:
    assert engines.ENGINES["cuda"].packed
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert "needs an NVIDIA GPU" in engines.missing_engines()["cuda"]
    with pytest.raises(UnavailableError, match="engine 'cuda' runs on cuda, not on cpu"):
        engines.choose_engine("cuda", "cpu")


def test_auto_takes_it_where_it_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    there = dataclasses.replace(engines.ENGINES["cuda"], why_unavailable=lambda: None)
    monkeypatch.setitem(engines.ENGINES, "cuda", there)
    assert engines.choose_engine("auto", "cuda").value == "cuda"
    assert engines.choose_engine("auto", "cuda", packed=True).value == "cuda"
    assert engines.choose_engine("cuda", "cuda:1").value == "cuda"


def test_what_the_driver_says_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    monkeypatch.setattr(metadata, "version", lambda name: "2.13.0")
    monkeypatch.setattr(available.importlib.util, "find_spec", lambda name: object())
    for capability, message in ((None, "the driver finds none"), ((7, 5), "8.0 .* this GPU has 7.5")):
        monkeypatch.setattr(available, "compute_capability", lambda found=capability: found)
        assert re.search(message, str(available.why_unavailable()))
    monkeypatch.setattr(available, "compute_capability", lambda: (9, 0))
    assert available.why_unavailable() is None
    monkeypatch.setattr(available.importlib.util, "find_spec", lambda name: None)
    assert "needs triton" in str(available.why_unavailable())


def test_shapes_that_do_not_fit_are_refused() -> None:
    assert why_unfit(preset("8b")) is None
    assert "head_dim up to 256, got 512" in str(why_unfit(preset("test", hidden_size=512, num_heads=1)))
