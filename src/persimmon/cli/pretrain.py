"""`persimmon pretrain`: train a model from scratch on prepared data."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from persimmon.train.pretrain import PretrainRecipe

HELP = "pretrain a model from a recipe"


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of every verb that runs a training recipe."""
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file (see configs/)")
    parser.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE",
        help="change one setting of the recipe, e.g. loop.optimizer.matrix_lr=0.01 (repeatable)",
    )  # fmt: skip
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of the run")
    parser.add_argument("--plot", metavar="FILE", help="where the curves go (default: OUTPUT/curves.png)")
    parser.add_argument("--quiet", action="store_true", help="no progress, held-out scores only")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    add_recipe_arguments(parser)
    parser.add_argument("--plan", action="store_true", help="print memory, FLOPs and days, and start nothing")
    parser.add_argument(
        "--hardware",
        default="8xH100",
        metavar="NxNAME",
        help="with --plan: A100, H100, H200 (with a count) or laptop (default: 8xH100)",
    )
    parser.add_argument("--json", action="store_true", help="with --plan: machine-readable")


def print_plan(recipe: PretrainRecipe, hardware: str, as_json: bool) -> None:
    """Print the plan of a recipe on some hardware."""
    import json

    from persimmon.train.hardware import parse_hardware
    from persimmon.train.plan import make_plan, render

    plan = make_plan(recipe, *parse_hardware(hardware))
    print(json.dumps(plan.as_dict()) if as_json else render(plan))


def draw_curves(output: str, picture: str | None, result: str = "model") -> None:
    """Plot the finished run when matplotlib is there, and say where the result is: OUTPUT/`result`."""
    import sys
    from pathlib import Path

    from persimmon.errors import UnavailableError
    from persimmon.train.plot import plot_run

    target = Path(picture) if picture else Path(output) / "curves.png"
    try:
        plot_run(Path(output) / "metrics.jsonl", target)
        print(f"curves: {target}", file=sys.stderr)
    except UnavailableError as error:
        if picture:
            raise
        print(f"no plot: {error}", file=sys.stderr)
    print(f"{result}: {Path(output) / result}", file=sys.stderr)


def run(args: argparse.Namespace) -> int:
    """Execute the verb."""
    from persimmon.train.console import ConsoleReport
    from persimmon.train.pretrain import PretrainRecipe, pretrain
    from persimmon.train.recipe import load_recipe

    recipe = load_recipe(PretrainRecipe, args.recipe, args.overrides)
    if args.plan:
        print_plan(recipe, args.hardware, args.json)
        return 0
    pretrain(recipe, resume=args.resume, report=ConsoleReport(quiet=args.quiet))
    if os.environ.get("RANK", "0") == "0":  # torchrun starts this program once for every process
        draw_curves(recipe.output, args.plot)
    return 0
