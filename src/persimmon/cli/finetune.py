"""`persimmon finetune`: teach a model to chat or to prefer, as a whole or by adapters, or plan the memory for it."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persimmon.cli.pretrain import add_recipe_arguments, draw_curves

if TYPE_CHECKING:
    from persimmon.config import ModelConfig
    from persimmon.train.finetune_recipe import FinetuneRecipe

HELP = "fine-tune a model on conversations or preferences from a recipe"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    add_recipe_arguments(parser)
    group = parser.add_argument_group("the plan")
    group.add_argument("--plan", action="store_true", help="print what the run takes of memory, by part, and stop")
    group.add_argument("--memory", type=float, metavar="GB", help="say whether it fits, and what to change if not")
    group.add_argument(
        "--weights", metavar="FORMAT",
        help="plan for weights in float32, bfloat16, q8 or q4 (default: the model's and recipe's)",
    )  # fmt: skip
    group.add_argument("--json", action="store_true", help="print the plan as one JSON document")


def run(args: argparse.Namespace) -> int:
    """Execute the verb."""
    from persimmon.errors import InputError
    from persimmon.train.console import ConsoleReport
    from persimmon.train.finetune import finetune
    from persimmon.train.finetune_recipe import FinetuneRecipe
    from persimmon.train.recipe import load_recipe

    recipe = load_recipe(FinetuneRecipe, args.recipe, args.overrides)
    if args.plan:
        return _plan(args, recipe)
    if args.memory is not None or args.weights is not None or args.json:
        raise InputError("--memory, --weights and --json belong to --plan")
    finetune(recipe, resume=args.resume, report=ConsoleReport(quiet=args.quiet))
    if os.environ.get("RANK", "0") == "0":  # torchrun starts this program once for every process
        draw_curves(recipe.output, args.plot, "adapter" if recipe.trains_adapters else "model")
    return 0


def _plan(args: argparse.Namespace, recipe: FinetuneRecipe) -> int:
    import dataclasses

    from persimmon.checkpoints.adapters import open_adapter
    from persimmon.cli.console import print_json
    from persimmon.train import memory_plan

    config, packed = _model(recipe.model)
    adapter = recipe.lora
    if recipe.adapter is not None:
        adapter = open_adapter(Path(recipe.adapter), config).settings
    setup = memory_plan.setup_of(recipe, adapter, packed)
    if args.weights is not None:
        setup = dataclasses.replace(setup, weights=args.weights)
    parts = memory_plan.plan(config, setup)
    total = memory_plan.total_bytes(parts)
    document: dict[str, Any] = {
        "model": recipe.model,
        "setup": dataclasses.asdict(setup),
        "trained_parameters": memory_plan.trained_parameters(config, setup),
        "parts": [dataclasses.asdict(part) for part in parts],
        "total_bytes": total,
    }
    if args.memory is not None:
        budget = round(args.memory * 1e9)
        steps = memory_plan.advice(config, setup, budget)
        document |= {"budget_bytes": budget, "fits": total <= budget}
        document["changes"] = [{"change": change, "total_bytes": size} for change, size in steps]
    if args.json:
        print_json(document)
    else:
        _show(document)
    return 0


def _model(name: str) -> tuple[ModelConfig, str | None]:
    """Shape of the model that a recipe names, and its format if it is quantized; presets are shapes, too."""
    from persimmon.checkpoints.directory import read_config
    from persimmon.checkpoints.download import SHIPPED, resolve
    from persimmon.config import PRESETS, preset
    from persimmon.fast.cpu.packed import is_packed, open_packed

    if name in PRESETS and name not in SHIPPED and not Path(name).is_dir():
        return preset(name), None
    directory = resolve(name, weights=False)
    if is_packed(directory):
        opened = open_packed(directory)
        return opened.config, opened.form.name
    return read_config(directory), None


def _show(document: dict[str, Any]) -> None:
    from persimmon.cli.info import size

    setup = document["setup"]
    print(f"{document['model']}: {document['trained_parameters']:,} parameters train, weights {setup['weights']}, "
          f"{setup['micro_tokens']:,} tokens at a time")  # fmt: skip
    for part in document["parts"]:
        print(f"  {size(part['bytes']):>8}  {part['name']}: {part['what']}")
    print(f"  {size(document['total_bytes']):>8}  in all")
    if "budget_bytes" not in document:
        return
    verdict = "fits" if document["fits"] else "does not fit"
    print(f"{verdict} into {size(document['budget_bytes'])}")
    for change in document["changes"]:
        print(f"  {size(change['total_bytes']):>8}  with {change['change']}")
    if document["changes"] and document["changes"][-1]["total_bytes"] > document["budget_bytes"]:
        print("  nothing here brings it down to that; take a smaller model or more memory")
