"""`persimmon finetune`: teach a model to chat, loss on the answers only."""

from __future__ import annotations

import argparse

from persimmon.cli.pretrain import add_recipe_arguments, draw_curves

HELP = "fine-tune a model on conversations from a recipe"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    add_recipe_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Execute the verb."""
    from persimmon.train.console import ConsoleReport
    from persimmon.train.finetune import FinetuneRecipe, finetune
    from persimmon.train.recipe import load_recipe

    recipe = load_recipe(FinetuneRecipe, args.recipe, args.overrides)
    finetune(recipe, resume=args.resume, report=ConsoleReport(quiet=args.quiet))
    draw_curves(recipe.output, args.plot, "adapter" if recipe.trains_adapters else "model")
    return 0
