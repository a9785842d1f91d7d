"""A run that is killed and resumed must repeat the losses of an undisturbed one, bit for bit."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from made_corpus import write_recipe

_PROGRAM = """
import sys
from persimmon.train.pretrain import PretrainRecipe, pretrain
from persimmon.train.recipe import load_recipe

def report(row):
    print(row["step"], flush=True)

if __name__ == "__main__":
    pretrain(load_recipe(PretrainRecipe, sys.argv[1]), resume=sys.argv[2] == "resume", report=report)
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "program.py"
    path.write_text(_PROGRAM)
    return path


def run(program: Path, recipe: Path, mode: str, kill_at: int | None = None) -> list[int]:
    """The steps it reported, to its end or until it was killed."""
    steps: list[int] = []
    command = [sys.executable, str(program), str(recipe), mode]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    for line in process.stdout:
        steps.append(int(line))
        if kill_at is not None and int(line) >= kill_at:
            os.killpg(process.pid, signal.SIGKILL)
            break
    process.wait(timeout=120)
    steps += [int(line) for line in process.stdout]  # what it did until the signal came
    assert (process.returncode == 0) == (kill_at is None)
    return steps


def assert_joins(before: list[int], after: list[int]) -> None:
    """Steps of a run and of the one that resumed it: no gap, and not from the start again.

    With a save behind every step, that of step n - 1 is done when step n is reported.
    """
    assert after == list(range(after[0], after[-1] + 1))
    assert 1 < before[-1] <= after[0] <= before[-1] + 1


def losses(settings: dict[str, Any]) -> list[float]:
    rows = [json.loads(line) for line in (Path(settings["output"]) / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


@pytest.mark.parametrize(
    ("processes", "changes"),
    [(1, {}), (1, {"dtype": "bfloat16"}), (1, {"optimizer": {"matrices": "adamw", "matrix_lr": 1e-3}}), (2, {})],
    ids=["muon", "bfloat16", "adamw", "two-processes"],
)
def test_killed_run_repeats_the_losses(
    pretrain_settings: dict[str, Any], tmp_path: Path, program: Path, processes: int, changes: dict[str, Any]
) -> None:
    pretrain_settings |= {"processes": processes}
    pretrain_settings["loop"] |= {"checkpoint_minutes": 0.0, **changes}
    whole = pretrain_settings | {"output": str(tmp_path / "whole")}
    run(program, write_recipe(whole, tmp_path / "whole.yaml"), "new")
    broken = pretrain_settings | {"output": str(tmp_path / "broken")}
    recipe = write_recipe(broken, tmp_path / "broken.yaml")
    kills = random.Random(f"{processes}{changes}").sample(range(2, 11), 2)  # at the second report the first is saved
    first = run(program, recipe, "new", kill_at=min(kills))
    second = run(program, recipe, "resume", kill_at=max(kills))
    last = run(program, recipe, "resume")
    assert_joins(first, second)
    assert_joins(second, last)
    assert last[-1] == 12
    assert len(losses(whole)) == 12
    assert losses(broken) == losses(whole)


def test_a_killed_save_leaves_the_older_checkpoint(
    pretrain_settings: dict[str, Any], tmp_path: Path, program: Path
) -> None:
    """SIGKILL at arbitrary moments, also inside a save: what is found is whole."""
    from persimmon.train.checkpoint import verified_state

    pretrain_settings["loop"] |= {"checkpoint_minutes": 0.0}
    recipe = write_recipe(pretrain_settings, tmp_path / "recipe.yaml")
    rng, newest = random.Random(1), 0
    for attempt in range(3):
        command = [sys.executable, str(program), str(recipe), "resume"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        # The save of a step goes on behind its report and is done before that of the next one.
        steps = [int(process.stdout.readline()) for _ in range(2)]
        assert steps == [newest + 1, newest + 2], "it goes on where the newest checkpoint ends"
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.wait(timeout=60)
        process.stdout.close()
        checkpoints = Path(pretrain_settings["output"]) / "checkpoints"
        found = sorted(checkpoints.glob("step-????????"))
        assert found, f"no checkpoint after attempt {attempt}"
        assert all(verified_state(path) is not None for path in found)
        newest = int(found[-1].name.removeprefix("step-"))


@pytest.mark.parametrize(
    ("number", "processes", "code"), [("SIGTERM", 1, 143), ("SIGINT", 1, 130), ("SIGTERM", 2, 143)]
)
def test_a_signal_saves_and_leaves_and_the_run_goes_on_as_if_nothing_was(
    pretrain_settings: dict[str, Any], tmp_path: Path, program: Path, number: str, processes: int, code: int
) -> None:
    pretrain_settings |= {"processes": processes}
    whole = pretrain_settings | {"output": str(tmp_path / "whole")}
    run(program, write_recipe(whole, tmp_path / "whole.yaml"), "new")
    recipe = write_recipe(pretrain_settings, tmp_path / "recipe.yaml")
    process = subprocess.Popen(
        [sys.executable, str(program), str(recipe), "new"], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(getattr(signal, number))
    process.stdout.read()
    process.stdout.close()
    assert process.wait(timeout=120) == code
    done = len(losses(pretrain_settings))
    found = [p.name for p in (Path(pretrain_settings["output"]) / "checkpoints").iterdir()]
    assert found == [f"step-{done:08d}"] and done < 12  # the clock alone would have saved nothing
    assert run(program, recipe, "resume") == list(range(done + 1, 13))
    assert losses(pretrain_settings) == losses(whole)


def test_torchrun_starts_the_same_run(pretrain_settings: dict[str, Any], tmp_path: Path, program: Path) -> None:
    local = pretrain_settings | {"output": str(tmp_path / "local"), "processes": 2}
    run(program, write_recipe(local, tmp_path / "local.yaml"), "new")
    recipe = write_recipe(pretrain_settings, tmp_path / "recipe.yaml")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*command, str(program), str(recipe), "new"], check=True, capture_output=True, timeout=240)
    assert losses(pretrain_settings) == losses(local)
    assert (Path(pretrain_settings["output"]) / "model" / "config.json").is_file()
    assert list((Path(pretrain_settings["output"]) / "tensorboard").iterdir())
