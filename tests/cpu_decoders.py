"""The CPU engine's decoder over a model in memory."""

from __future__ import annotations

from typing import Any

import pytest

from persimmon.fast.cpu.decoder import CpuDecoder
from persimmon.fast.cpu.formats import FORMATS
from persimmon.fast.cpu.native_module import why_unavailable
from persimmon.fast.cpu.weights import arrange
from persimmon.model import PersimmonModel


def cpu_decoder(model: PersimmonModel, **options: Any) -> CpuDecoder:
    """In float32; skips the test, saying why, where the engine was not built."""
    reason = why_unavailable()
    if reason is not None:
        pytest.skip(reason)
    state = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    return CpuDecoder(
        model.config, FORMATS["float32"], arrange(model.config, FORMATS["float32"], state.__getitem__), **options
    )
