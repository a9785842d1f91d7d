"""`persimmon doctor`: what this machine has, which engine will run, and why."""

from __future__ import annotations

import argparse
import platform
import textwrap
import time
from typing import Any

from persimmon import machine
from persimmon.machine import size_text

HELP = "what this machine has, which engine will run, and why"

_PACKAGES = ("torch", "numpy", "safetensors", "sentencepiece", "tokenizers", "huggingface_hub")
_BANDWIDTH_BYTES = 256 << 20
"""Far above any cache; the measurement takes about a second."""

_NAME_WIDTH = 14


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("--device", default="auto", metavar="NAME", help="the device to ask about (default: auto)")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(args: argparse.Namespace) -> int:
    """Execute the verb."""
    from persimmon.cli.console import print_json

    findings = examine(args.device)
    if args.json:
        print_json(findings)
    else:
        print(report(findings))
    return 0


def examine(device: str = "auto") -> dict[str, Any]:
    """Everything the verb reports, as JSON types; sizes in bytes, bandwidth in GB/s."""
    return {
        "versions": _versions(),
        "cpu": {
            "name": machine.cpu_name(),
            "features": machine.cpu_features(),
            "threads": machine.cpu_threads(),
            "compiler": machine.compiler(),
        },
        "memory": {
            "total": machine.memory_total(),
            "available": machine.memory_available(),
            "read_bandwidth_gb_s": measure_read_bandwidth(),
        },
        "gpus": _gpus(),
        "models": _models(machine.memory_total()),
        "engine": _engine(device),
    }


def measure_read_bandwidth() -> float:
    """GB/s at which all threads of PyTorch read memory: the best of five sums over an array far larger than the caches.

    Decoding reads every weight once per token, so this number over the bytes of a model bounds its tokens/s.
    """
    import torch

    data = torch.ones(_BANDWIDTH_BYTES // 4)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        data.sum()
        seconds.append(time.perf_counter() - started)
    return _BANDWIDTH_BYTES / min(seconds) / 1e9


def _versions() -> dict[str, str | None]:
    from importlib import metadata  # a slow import, and `persimmon --help` imports this module

    versions: dict[str, str | None] = {"persimmon": metadata.version("persimmon"), "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    versions["system"] = platform.platform()
    return versions


def _gpus() -> list[dict[str, Any]]:
    import torch

    gpus: list[dict[str, Any]] = []
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        capability = f"{facts.major}.{facts.minor}"
        gpus.append({"name": facts.name, "memory": facts.total_memory, "compute_capability": capability})
    if torch.backends.mps.is_available():
        gpus.append({"name": "Apple GPU (mps)", "memory": torch.mps.recommended_max_memory()})
    return gpus


def _models(memory: int | None) -> list[dict[str, Any]]:
    """What the whole context of each preset needs in memory, and whether this machine has it."""
    from persimmon.accounting import plan_memory
    from persimmon.config import PRESETS

    plans: list[dict[str, Any]] = []
    for name in ("mini", "1b", "8b"):
        for dtype in ("float32", "bfloat16"):
            need = plan_memory(PRESETS[name], PRESETS[name].max_positions, dtype, dtype).total_bytes
            fits = None if memory is None else need <= memory
            plans.append({"preset": name, "dtype": dtype, "bytes": need, "fits": fits})
    return plans


def _engine(device: str) -> dict[str, Any]:
    """What `load` would choose on its own, and the reasons."""
    import torch

    from persimmon.engines import choose_device, choose_engine, installed_engines, missing_engines

    on = choose_device(device)
    by = choose_engine("auto", on.value)
    return {
        "device": on.value,
        "device_reason": on.reason,
        "name": by.value,
        "reason": by.reason,
        "threads": torch.get_num_threads(),
        "installed": installed_engines(),
        "missing": missing_engines(),
    }


def report(findings: dict[str, Any]) -> str:
    """The findings for a person."""
    cpu, memory, engine = findings["cpu"], findings["memory"], findings["engine"]
    versions = {name: version or "not installed" for name, version in findings["versions"].items()}
    rows = [
        ("persimmon", f"{versions.pop('persimmon')}, Python {versions.pop('python')}, {versions.pop('system')}"),
        ("packages", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ("processor", f"{cpu['name'] or 'unknown'}, {cpu['threads']} threads"),
        ("instructions", " ".join(cpu["features"]) or "unknown"),
        ("memory", f"{size_text(memory['total'])}, {size_text(memory['available'])} available"),
        ("reads", f"{memory['read_bandwidth_gb_s']:.1f} GB/s (measured now)"),
        ("GPU", "; ".join(f"{gpu['name']}, {size_text(gpu['memory'])}" for gpu in findings["gpus"]) or "none"),
        ("compiler", cpu["compiler"] or "none"),
        ("models", "; ".join(_verdict(plan) for plan in findings["models"])),
        ("engines", "; ".join(f"{name} ({summary})" for name, summary in engine["installed"].items())),
        ("will run", f"{engine['name']} on {engine['device']}, {engine['threads']} CPU threads"),
        ("because", f"{engine['device_reason']}; {engine['name']} is {engine['reason']}"),
    ]
    return "\n".join(_wrapped(name, value) for name, value in rows)


def _wrapped(name: str, value: str) -> str:
    """`name  value`, long values on several lines."""
    lines = textwrap.wrap(value, 100 - _NAME_WIDTH, break_on_hyphens=False) or [""]
    return "\n".join(
        f"{label:<{_NAME_WIDTH}}{line}" for label, line in zip([name] + [""] * len(lines), lines, strict=False)
    )


def _verdict(plan: dict[str, Any]) -> str:
    words = {True: "fits", False: "does not fit", None: "in unknown memory"}
    return f"{plan['preset']} {plan['dtype']} {size_text(plan['bytes'])} {words[plan['fits']]}"
