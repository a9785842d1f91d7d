"""`persimmon info`: what a model is and what it costs, from its configuration and file headers alone."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persimmon.cli.options import add_model_argument, model_name

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from persimmon.checkpoints.tensors import StoredTensor
    from persimmon.config import ModelConfig

HELP = "show a model's configuration, parameters, bytes per token and memory needs"

_CONTEXTS = (2_048, 4_096, 8_192, 16_384)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    add_model_argument(parser)
    parser.add_argument(
        "--active", type=float, metavar="SHARE",
        help="share of MLP neurons that are not zero, for the sparse figures (default: 0.10, as published for the 8B)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print everything as one JSON document")


def run(args: argparse.Namespace) -> int:
    """Execute the verb."""
    from persimmon.accounting import PUBLISHED_ACTIVE_SHARE
    from persimmon.cli.console import print_json

    subject = _find(model_name(args))
    document = _describe(subject, PUBLISHED_ACTIVE_SHARE if args.active is None else args.active)
    if args.json:
        print_json(document)
    else:
        _show(document)
    return 0


# -- facts ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Subject:
    """What is described: a model on disk, a model on the hub without its weights, or a preset."""

    name: str
    config: ModelConfig
    path: Path | None = None
    weights: dict[str, Any] | None = None


def _find(name: str) -> _Subject:
    from persimmon.checkpoints.directory import has_weights, open_directory, read_config
    from persimmon.checkpoints.download import resolve
    from persimmon.config import PRESETS, preset
    from persimmon.errors import NotFoundError
    from persimmon.fast.cpu.packed import is_packed, open_packed

    if name in PRESETS and not Path(name).is_dir():
        try:
            path = resolve(name, weights=False)
        except NotFoundError:
            return _Subject(name, preset(name))
    else:
        path = resolve(name, weights=False)
    if is_packed(path):
        packed = open_packed(path)
        return _Subject(name, packed.config, path, _weights(packed.form.name, packed.tensors.values()))
    if has_weights(path):
        opened = open_directory(path)
        return _Subject(name, opened.config, path, _weights(opened.dtype, opened.tensors.values()))
    return _Subject(name, read_config(path), path)


def _describe(subject: _Subject, active: float) -> dict[str, Any]:
    from persimmon import accounting

    config = subject.config
    count = accounting.count_parameters(config)
    contexts = sorted({context for context in _CONTEXTS if context <= config.max_positions} | {config.max_positions})
    return {
        "model": subject.name,
        "path": str(subject.path) if subject.path else None,
        "licence": _licence(subject),
        "configuration": {
            **dataclasses.asdict(config), "head_dim": config.head_dim, "rotary_dim": config.rotary_dim,
        },
        "parameters": {**dataclasses.asdict(count), "total": count.total, "read_per_token": count.read_per_token},
        "weights": subject.weights,
        "flops_per_token": {
            "context": config.max_positions,
            "decoding": accounting.decoding_flops_per_token(config, config.max_positions),
            "training": accounting.training_flops_per_token(config, config.max_positions),
        },
        "active": active,
        "bytes_per_token": {
            name: {
                "dense": accounting.weight_bytes_per_token(config, name),
                "skip_down": accounting.weight_bytes_per_token(config, name, active=active, skip="down"),
                "skip_both": accounting.weight_bytes_per_token(config, name, active=active, skip="both"),
            }
            for name in accounting.WEIGHT_BITS
        },
        "kv_bytes_per_token": {name: accounting.kv_bytes_per_token(config, name) for name in accounting.KV_BYTES},
        "memory": [
            {**dataclasses.asdict(plan), "total_bytes": plan.total_bytes}
            for weights in accounting.WEIGHT_BITS
            for kv in accounting.KV_BYTES
            for plan in (accounting.plan_memory(config, context, weights, kv) for context in contexts)
        ],
        "gpus": _gpu_plans(config),
    }  # fmt: skip


def _gpu_plans(config: ModelConfig) -> list[dict[str, Any]]:
    """What the cuda engine would choose on GPUs of common sizes, and why; with the parts in bytes."""
    from persimmon.errors import UnavailableError
    from persimmon.fast.cuda.plan import CARDS, choose

    plans: list[dict[str, Any]] = []
    for card, memory in CARDS.items():
        try:
            chosen = choose(config, memory)
        except UnavailableError as error:
            plans.append({"card": card, "memory": memory, "fits": False, "reason": str(error)})
            continue
        plans.append({"card": card, "fits": True, **dataclasses.asdict(chosen), "total": chosen.total})
    return plans


def _licence(subject: _Subject) -> str | None:
    from persimmon.checkpoints.releases import by_name, licence_of

    release = by_name(subject.name.partition("@")[0])
    if release is not None:
        return f"{release.licence} ({release.note})"
    return licence_of(subject.path) if subject.path else None


def _weights(dtype: str, tensors: Collection[StoredTensor]) -> dict[str, Any]:
    files = sorted({tensor.file for tensor in tensors})
    return {
        "dtype": dtype,
        "tensors": len(tensors),
        "files": [file.name for file in files],
        "bytes": sum(file.stat().st_size for file in files),
    }


# -- tables --------------------------------------------------------------------------------------------------


def _show(document: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    _show_heading(console, document)
    _show_configuration(console, document["configuration"])
    _show_parameters(console, document["parameters"])
    _show_per_token(console, document)
    _show_memory(console, document["memory"])
    _show_gpus(console, document["gpus"])


def _show_heading(console: Console, document: dict[str, Any]) -> None:
    from rich.markup import escape

    console.print(
        f"[bold]{escape(document['model'])}[/]  {document['parameters']['total']:,} parameters", soft_wrap=True
    )
    weights = document["weights"]
    if weights:
        files = weights["files"][0] if len(weights["files"]) == 1 else f"{len(weights['files'])} files"
        console.print(f"{weights['dtype']}, {size(weights['bytes'])} in {files}, {weights['tensors']} tensors")
    elif document["path"] is None:
        console.print("a preset: a shape without weights")
    else:
        console.print("configuration only; the weights are not downloaded")
    if document["path"]:
        console.print(escape(document["path"]), soft_wrap=True)
    if document["licence"] or document["path"]:
        console.print(f"licence: {escape(document['licence'] or 'not stated')}")


def _table(console: Console, title: str, *columns: str) -> Table:
    """A table under its title; the first column is text, the others are numbers."""
    from rich import box
    from rich.table import Table

    console.print(f"\n[bold]{title}[/]")
    table = Table(box=box.SIMPLE_HEAD, show_header=any(columns), pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    return table


def _show_configuration(console: Console, facts: dict[str, Any]) -> None:
    table = _table(console, "Configuration", "", "")
    rows = {
        "layers x hidden x MLP": f"{facts['num_layers']} x {facts['hidden_size']:,} x {facts['intermediate_size']:,}",
        "heads x dimensions": f"{facts['num_heads']} x {facts['head_dim']}",
        "vocabulary rows": f"{facts['vocab_size']:,}",
        "end-of-text id": f"{facts['eos_token_id']:,}",
        "context": f"{facts['max_positions']:,} tokens",
        "rotary dimensions": f"{facts['rotary_dim']} of {facts['head_dim']}",
        "rotary base": f"{facts['rotary_base']:,.6g}, in {facts['rotary_precision']}",
        "QK LayerNorm": "yes" if facts["qk_layernorm"] else "no",
        "LayerNorm epsilon": f"{facts['layer_norm_eps']:g}",
    }
    if facts["hidden_dropout"]:
        rows["hidden dropout"] = f"{facts['hidden_dropout']:g}, never applied"
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)


def _show_parameters(console: Console, counts: dict[str, int]) -> None:
    table = _table(console, "Parameters", "part", "number", "share")
    for part in ("embedding", "attention", "mlp", "norms", "head", "total"):
        label = "MLP" if part == "mlp" else part
        share = counts[part] / counts["total"]
        table.add_row(label, f"{counts[part]:,}", f"{share:.1%}", end_section=part == "head")
    console.print(table)


def _show_per_token(console: Console, document: dict[str, Any]) -> None:
    active = f"{document['active']:.0%} active"
    columns = ("format", "dense", f"{active}: down", f"{active}: both")
    table = _table(console, "Weights read per decoded token", *columns)
    for name, counts in document["bytes_per_token"].items():
        table.add_row(name, *(size(counts[key]) for key in ("dense", "skip_down", "skip_both")))
    console.print(table)
    flops = document["flops_per_token"]
    kv = ", ".join(f"{size(count)} ({name})" for name, count in document["kv_bytes_per_token"].items())
    console.print("down: the second MLP matrix's inactive rows are skipped; both: the first's too")
    console.print(f"KV cache per token: {kv}")
    work = f"{size(flops['decoding'], 'FLOP')} decoding, {size(flops['training'], 'FLOP')} training"
    console.print(f"per token at {flops['context']:,} tokens: {work}")


def _show_memory(console: Console, plans: list[dict[str, Any]]) -> None:
    from persimmon.machine import memory_available

    free = memory_available()
    contexts = sorted({plan["context"] for plan in plans})
    title = "Memory for one sequence, by context in tokens"
    table = _table(console, title, "weights + KV cache", *(f"{context:,}" for context in contexts))
    rows: dict[str, list[str]] = {}
    for plan in plans:
        fits = free is not None and plan["total_bytes"] <= free
        cell = f"[green]{size(plan['total_bytes'])}[/]" if fits else size(plan["total_bytes"])
        rows.setdefault(f"{plan['weight_format']} + {plan['kv_dtype']}", []).append(cell)
    for index, (name, cells) in enumerate(rows.items()):
        table.add_row(name, *cells, end_section=index % 3 == 2)
    console.print(table)
    if free is not None:
        colour = " (green fits)" if console.color_system else ""
        console.print(f"free on this machine: {size(free)}{colour}")


def _show_gpus(console: Console, plans: list[dict[str, Any]]) -> None:
    """The choice per card in a table, the reasons below it. In GiB, as cards' sizes are."""
    from persimmon.fast.cuda.plan import GIB

    table = _table(
        console, "On a GPU, one sequence (cuda engine; computed)", "card", "weights", "KV cache", "context", "takes"
    )
    for plan in plans:
        cells = ["does not fit", "", "", ""]
        if plan["fits"]:
            cells = [plan["weight_format"], plan["kv_dtype"], f"{plan['context']:,}", f"{plan['total'] / GIB:.1f} GiB"]
        table.add_row(plan["card"], *cells)
    console.print(table)
    for plan in plans:
        console.print(f"{plan['card']}: {plan['reason']}")


def size(count: float, unit: str = "B") -> str:
    """A number of bytes (or another unit) for people, in decimal steps: `18.8 GB`."""
    prefixes = ["", "k", "M", "G"]
    while count >= 999.5 and len(prefixes) > 1:
        count /= 1_000
        prefixes.pop(0)
    digits = 0 if not prefixes[0] or count >= 99.95 else 1 if count >= 9.995 else 2
    return f"{count:,.{digits}f} {prefixes[0]}{unit}"
