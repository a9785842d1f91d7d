"""pytest plugin: kernels from the extension file that PERSIMMON_SANITIZED_NATIVE names, not the installed ones."""

from __future__ import annotations

import importlib.util
import os
import sys

import persimmon.fast.cpu

NAME = "persimmon.fast.cpu._native"

_spec = importlib.util.spec_from_file_location(NAME, os.environ["PERSIMMON_SANITIZED_NATIVE"])
assert _spec is not None and _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
sys.modules[NAME] = _module
_spec.loader.exec_module(_module)
setattr(persimmon.fast.cpu, "_native", _module)  # noqa: B010 - mypy does not know the attribute
