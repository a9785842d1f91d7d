"""Plans: arithmetic that can be checked by hand, the published run, and what to change when it does not fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from persimmon.accounting import count_parameters
from persimmon.cli.main import main
from persimmon.config import preset
from persimmon.errors import ConfigError, InputError
from persimmon.model import PersimmonModel
from persimmon.train.hardware import DEVICES, parse_hardware
from persimmon.train.loss import chunk_for
from persimmon.train.mesh import ParallelRecipe
from persimmon.train.optimizer import OptimizerRecipe, build_optimizers
from persimmon.train.plan import make_plan, render
from persimmon.train.pretrain import PretrainRecipe
from persimmon.train.recipe import load_recipe

ROOT = Path(__file__).parents[2]


def recipe(name: str, *overrides: str) -> PretrainRecipe:
    return load_recipe(PretrainRecipe, ROOT / "configs" / f"{name}.yaml", overrides)


def test_the_published_run() -> None:
    plan = make_plan(recipe("8b"), *parse_hardware("8xH100"))
    assert plan.parameters == 9_397_175_296
    assert (plan.steps, plan.tokens) == (375_000, 120 * 16_384 * 375_000)
    assert plan.flops_per_token == pytest.approx(64.4e9, rel=1e-3)
    assert plan.total_flops == pytest.approx(4.75e22, rel=1e-2)
    assert plan.memory.weights == pytest.approx(4 * 9_397_175_296 / 8)
    assert plan.memory.optimizer == pytest.approx(8 * 9_397_175_296 / 8)
    assert plan.days == pytest.approx(plan.total_flops / (8 * 989e12 * 0.35) / 86_400)


def test_one_byte_moments_are_a_quarter() -> None:
    settings = ("loop.optimizer.matrices=adamw", "loop.optimizer.state=int8")
    plan = make_plan(recipe("mini", *settings), *parse_hardware("1xH100"))
    assert plan.memory.optimizer == round((2 + 8 / 256) * plan.parameters)


def test_the_page_shows_the_plan_as_it_is() -> None:
    page = (ROOT / "docs/training.md").read_text()
    shown = render(make_plan(recipe("8b"), *parse_hardware("64xH100")))
    assert shown in page


def test_chunks_of_logits_are_those_of_the_device() -> None:
    gpu, laptop = (make_plan(recipe("mini"), *parse_hardware(name)).memory for name in ("1xA100", "laptop"))
    head = 4 * count_parameters(preset("mini")).head
    vocabulary = preset("mini").vocab_size
    positions = chunk_for(torch.device("cuda"), vocabulary)
    assert (gpu.logits, laptop.logits) == (head + 8 * vocabulary * positions, head + 12 * vocabulary * 512)
    assert positions > 512


def test_the_copy_of_a_checkpoint_counts_where_it_lies() -> None:
    gpu, laptop = (make_plan(recipe("mini"), *parse_hardware(name)) for name in ("1xA100", "laptop"))
    copied = gpu.memory.weights + gpu.memory.optimizer
    assert (gpu.memory.checkpoint, gpu.host_bytes) == (0, copied)
    assert (laptop.memory.checkpoint, laptop.host_bytes) == (copied, 0)
    assert "host memory" in render(gpu) and "host memory" not in render(laptop)


@pytest.mark.parametrize("name", ["mini", "125m", "1b", "8b"])
def test_every_recipe_fits_its_own_hardware(name: str) -> None:
    hardware = {"mini": "laptop", "125m": "1xA100", "1b": "8xA100", "8b": "8xH100"}[name]
    assert make_plan(recipe(name), *parse_hardware(hardware)).fits


def test_what_does_not_fit_names_changes_that_do() -> None:
    one = make_plan(recipe("8b"), *parse_hardware("1xH100"))
    assert not one.fits and one.remedies
    assert "does not fit" in render(one) and one.remedies[-1] in render(one)
    many, device = parse_hardware(one.remedies[-1].split(" with ")[0].replace(" ", ""))
    assert make_plan(recipe("8b", "loop.parallel.shard=true"), many, device).fits
    whole = make_plan(recipe("8b", "loop.activations=all"), *parse_hardware("8xH100"))
    assert "loop.activations=selective" in whole.remedies


def test_weights_and_states_are_those_the_program_makes() -> None:
    """Plain data parallelism, Muon: bytes of the real tensors."""
    model = PersimmonModel(preset("test"))
    optimizers = build_optimizers(model, OptimizerRecipe())
    model(torch.arange(12)[None]).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()
    plain = recipe("mini", "model.preset=test")
    memory = make_plan(plain, 2, DEVICES["LAPTOP"]).memory
    states = [v for o in optimizers for s in o.state.values() for k, v in s.items() if k != "step"]
    vectors = sum(4 * v.numel() for v in states)
    assert memory.weights == memory.gradients == sum(4 * p.numel() for p in model.parameters())
    assert memory.optimizer == pytest.approx(vectors)


def test_splitting_divides_what_it_says() -> None:
    base = recipe("8b", "loop.micro_tokens=1")
    plans = {
        n: make_plan(replace(base, loop=replace(base.loop, parallel=p)), 8, DEVICES["H100"]).memory
        for n, p in {"shard": ParallelRecipe(shard=True), "context": ParallelRecipe(context=4, shard=True)}.items()
    }
    assert plans["context"].activations == pytest.approx(plans["shard"].activations / 4)
    assert plans["context"].weights == plans["shard"].weights


@pytest.mark.parametrize("text", ["", "0xH100", "8xB9000", "H100x8", "-1xA100"])
def test_unknown_hardware_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="A100, H100, H200, LAPTOP"):
        parse_hardware(text)


def test_devices_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match="3 devices do not divide"):
        make_plan(recipe("8b", "loop.parallel.tensor=2"), 3, DEVICES["H100"])


def test_the_verb_prints_the_plan_and_starts_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    config = str(ROOT / "configs/8b.yaml")
    assert main(["pretrain", config, "--plan", "--hardware", "16xH200", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["devices"] == 16 and found["fits"] is True and found["days"] > 0
    assert main(["pretrain", config, "--plan", "--hardware", "8xTPU"]) == 2
