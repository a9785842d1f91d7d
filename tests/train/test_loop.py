"""The loop: accumulation, processes, the sparsity penalty, guards and schedules."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from made_rows import RandomRows
from persimmon.accounting import count_parameters
from persimmon.config import preset
from persimmon.errors import ConfigError
from persimmon.model import PersimmonModel
from persimmon.train.loop import (
    LoopRecipe,
    ScheduleRecipe,
    Trainer,
    TrainingStopped,
)
from persimmon.train.loss import IGNORE
from persimmon.train.optimizer import OptimizerRecipe
from persimmon.train.parallel import World, run_processes
from persimmon.train.tracking import SpeedMeter, truncate_metrics


def build(recipe: LoopRecipe, directory: Path, world: World | None = None, **changes: Any) -> Trainer:
    model = PersimmonModel(preset("test"))
    model.initialize(torch.Generator().manual_seed(0), std=0.1)
    return Trainer(model, RandomRows(), 4, recipe, directory, world or World(), **changes)


@pytest.mark.parametrize("micro_tokens", [16, 32, 64])
def test_accumulation_does_not_change_the_step(tmp_path: Path, micro_tokens: int) -> None:
    whole = build(LoopRecipe(micro_tokens=96), tmp_path)
    parts = build(LoopRecipe(micro_tokens=micro_tokens), tmp_path)
    losses = [trainer._passes.run(0).loss for trainer in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    for a, b in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-6, rtol=1e-4)


def test_the_loss_is_the_mean_over_targets_that_count(tmp_path: Path) -> None:
    trainer = build(LoopRecipe(micro_tokens=32), tmp_path)
    batch = trainer.source.batch(0, range(6))
    logits = trainer.model(batch.token_ids, documents=batch.documents)
    expected = torch.nn.functional.cross_entropy(
        logits.detach().flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE
    )
    assert trainer.train_step()["loss"] == pytest.approx(float(expected), abs=1e-5)


def _train_in_process(world: World, directory: Path) -> None:
    torch.set_num_threads(1)
    trainer = build(LoopRecipe(sparsity_penalty=0.3), directory, world)
    rows = [trainer.train_step() for _ in range(4)]
    weights = {name: p.sum().item() for name, p in trainer.model.named_parameters()}
    (directory / f"rank{world.rank}of{world.size}.json").write_text(json.dumps([[r["loss"] for r in rows], weights]))


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    for size in (1, 2):
        run_processes(size, _train_in_process, tmp_path)
    one, first, second = (json.loads((tmp_path / f"rank{n}.json").read_text()) for n in ("0of1", "0of2", "1of2"))
    assert first == second  # bit for bit
    assert first[0] == pytest.approx(one[0], abs=1e-5)
    assert first[1] == pytest.approx(one[1], abs=5e-3)


def test_the_penalty_raises_the_share_of_zeros(tmp_path: Path) -> None:
    def final_zeros(weight: float) -> float:
        trainer = build(LoopRecipe(sparsity_penalty=weight), tmp_path)
        trainer.num_steps, rows = 30, []
        trainer._tokens_total = 30 * 96
        for _ in range(30):
            rows.append(trainer.train_step())
        return sum(rows[-1]["zeros"]) / 2

    assert final_zeros(3.0) > final_zeros(0.0) + 0.1


def test_a_penalty_that_starts_late_changes_nothing_before(tmp_path: Path) -> None:
    def losses(**settings: float) -> list[float]:
        trainer = build(LoopRecipe(sparsity_target=0.99, **settings), tmp_path)
        trainer.num_steps, trainer._tokens_total = 20, 20 * 96
        return [trainer.train_step()["loss"] for _ in range(20)]

    plain, late = losses(), losses(sparsity_penalty=3.0, sparsity_start=0.5)
    assert late[:11] == plain[:11]  # the eleventh loss is that of the tenth update
    assert late[11:] != plain[11:]


def test_after_its_end_neither_penalty_nor_lift_touches_the_model(tmp_path: Path) -> None:
    """From the end on the run goes on exactly as one without a penalty that is given the same weights."""

    def trainer(**settings: float) -> Trainer:
        made = build(LoopRecipe(sparsity_target=0.6, sparsity_lift=50.0, **settings), tmp_path)
        made.num_steps, made._tokens_total = 20, 20 * 96
        return made

    ends, never = trainer(sparsity_penalty=3.0, sparsity_end=0.5), trainer()
    assert [ends.sparsity_penalty()] + [ends.train_step() and ends.sparsity_penalty() for _ in range(10)] == [
        *[3.0] * 10, 0.0
    ]  # fmt: skip
    ends.save()
    ends.checkpoints.wait()
    assert never.resume() and never.step == 10
    after = [[one.train_step() for _ in range(10)] for one in (ends, never)]
    assert [row["loss"] for row in after[0]] == [row["loss"] for row in after[1]]
    assert all(row["zeros"] and "silent" in row for row in after[0])  # still counted


@pytest.mark.parametrize("span", [(-0.1, 1.0), (0.6, 0.5), (0.0, 1.1)])
def test_a_penalty_has_to_end_after_its_start_inside_the_run(span: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match="sparsity_start and sparsity_end"):
        LoopRecipe(sparsity_start=span[0], sparsity_end=span[1])


def test_silent_neurons_come_back_under_a_target(tmp_path: Path) -> None:
    def silent(lift: float) -> int:
        recipe = LoopRecipe(sparsity_penalty=0.1, sparsity_target=0.9, sparsity_lift=lift)
        trainer = build(recipe, tmp_path)
        trainer.num_steps, trainer._tokens_total = 40, 40 * 96
        with torch.no_grad():
            trainer.model.layers[0].mlp.dense_h_to_4h.bias.fill_(-3.0)
        return [trainer.train_step()["silent"][0] for _ in range(40)][-1]

    assert silent(20.0) < silent(0.0)


def test_a_loss_that_is_not_a_number_stops_before_the_update(tmp_path: Path) -> None:
    trainer = build(LoopRecipe(), tmp_path)
    trainer.train_step()
    with torch.no_grad():
        trainer.model.lm_head.weight[0, 0] = math.nan
    before = trainer.model.embed_tokens.weight.clone()
    with pytest.raises(TrainingStopped, match="step 2"):
        trainer.train_step()
    assert torch.equal(before, trainer.model.embed_tokens.weight)


def test_a_jump_of_the_loss_stops(tmp_path: Path) -> None:
    trainer = build(LoopRecipe(max_loss_jump=0.5), tmp_path)
    trainer.train_step()
    with torch.no_grad():
        trainer.model.lm_head.weight.mul_(40)
    with pytest.raises(TrainingStopped, match="running mean"):
        trainer.train_step()


def test_float16_is_refused() -> None:
    with pytest.raises(ConfigError, match="float16"):
        LoopRecipe(dtype="float16")


def test_wrong_optimizer_settings_are_refused() -> None:
    with pytest.raises(ConfigError, match="matrices"):
        OptimizerRecipe(matrices="sgd")
    with pytest.raises(ConfigError, match="clip"):
        OptimizerRecipe(clip=0.0)


def test_metrics_are_cut_back_to_the_resumed_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    truncate_metrics(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_run_evaluates_reports_and_writes_metrics(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    recipe = LoopRecipe(evaluate_every=3)
    trainer = build(recipe, tmp_path, evaluate=lambda model: {"text": 1.5}, report=seen.append)
    trainer.run()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == seen and [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row["step"] for row in rows if "held_out" in row] == [3, 4]
    assert rows[-1]["tokens"] == rows[-1]["of_tokens"] == 4 * 96


def test_fewer_rows_of_metrics_where_the_recipe_says_so(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    recipe = LoopRecipe(log_every=2, evaluate_every=3)
    build(recipe, tmp_path, evaluate=lambda model: {"text": 1.5}, report=seen.append).run()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 3, 4]  # 3 for its evaluation
    assert len(seen) == 4


def test_the_steps_before_a_failure_are_written_whatever_the_recipe_says(tmp_path: Path) -> None:
    def spoil(row: dict[str, Any]) -> None:
        if row["step"] == 3:
            with torch.no_grad():
                trainer.model.lm_head.weight[0, 0] = math.nan

    trainer = build(LoopRecipe(log_every=2, evaluate_every=0), tmp_path, report=spoil)
    with pytest.raises(TrainingStopped, match="step 4"):
        trainer.run()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 3]  # 3 is the last before the failure, 1 was never to be written


@pytest.mark.parametrize("name", ["micro_tokens", "keep_checkpoints", "log_every"])
def test_counts_are_at_least_one(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        LoopRecipe(**{name: 0})  # type: ignore[arg-type]


@pytest.mark.parametrize("changes", [{"kind": "linear"}, {"warmup": 0.6, "decay": 0.6}, {"floor": 2.0}])
def test_wrong_schedules_are_refused_at_once(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ScheduleRecipe(**changes)


def test_the_recipe_chooses_the_schedule() -> None:
    assert ScheduleRecipe(warmup=0.0, decay=0.5).factor(0.75) == pytest.approx(0.5)
    assert ScheduleRecipe(kind="cosine", warmup=0.0).factor(0.5) == pytest.approx(0.5)


def test_a_spike_is_skipped_where_the_recipe_says_so(tmp_path: Path) -> None:
    trainer = build(LoopRecipe(on_spike="skip", max_loss_jump=0.5, max_skipped=1), tmp_path)
    trainer.train_step()
    with torch.no_grad():
        trainer.model.lm_head.weight.mul_(40)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    row = trainer.train_step()
    assert row["skipped"] == 1 and "grad_norm" not in row and trainer.step == 2
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    assert all(p.grad is None for p in trainer.model.parameters())
    with pytest.raises(TrainingStopped, match="step 3"):
        trainer.train_step()


def test_loss_by_position_adds_up_to_the_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("persimmon.train.passes.BUCKET", 4)
    trainer = build(LoopRecipe(micro_tokens=32), tmp_path)
    batch = trainer.source.batch(0, range(6))
    found = trainer._passes.run(0)
    logits = trainer.model(batch.token_ids, documents=batch.documents).detach()
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORE, reduction="none"
    )
    from persimmon.model import document_positions

    positions = document_positions(batch.documents, 6, 16).flatten()
    for bucket in range(3):
        chosen = (positions // 4 == bucket) & (batch.targets.flatten() != IGNORE)
        assert found.by_position[bucket] == pytest.approx(float(losses[chosen].mean()), abs=1e-4)
    assert found.by_position[3] is None
    assert found.squared_lengths == 6 * (5**2 + 11**2)


def test_a_failed_checkpoint_is_told_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from persimmon.train import checkpoint

    complete, calls = checkpoint._complete, []

    def full_once(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")
        complete(*arguments)

    monkeypatch.setattr(checkpoint, "_complete", full_once)
    trainer = build(LoopRecipe(checkpoint_minutes=0.0, evaluate_every=0), tmp_path)
    rows: list[dict[str, Any]] = []
    trainer._report = rows.append
    trainer.run()
    assert sum("No space" in row.get("checkpoint_error", "") for row in rows) == 1
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-00000003", "step-00000004"]


def test_tensorboard_files_and_names(tmp_path: Path) -> None:
    from persimmon.train.tracking import flat_scalars

    pytest.importorskip("tensorboard")
    build(LoopRecipe(evaluate_every=0), tmp_path, evaluate=lambda m: {"text": 1.5}, sample=lambda m: "So.").run()
    assert list((tmp_path / "tensorboard").glob("events*"))
    row = {"step": 3, "loss": 2.0, "zeros": [0.5], "held_out": {"text": 1.5}, "loss_by_position": [1.0, None]}
    assert flat_scalars(row) == {
        "loss": 2.0, "zeros/layer_1": 0.5, "held_out/text": 1.5, "loss_by_position/0-2k": 1.0,
    }  # fmt: skip


def test_compiled_blocks_train_the_same(tmp_path: Path) -> None:
    import shutil

    if shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    losses = [[build(LoopRecipe(compile=compiled), tmp_path).train_step()["loss"]][0] for compiled in (False, True)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_frozen_weights_need_no_gradient_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    config = preset("test")
    monkeypatch.setattr("persimmon.train.tracking.measured_peak", lambda device, dtype: 1e9)
    whole, adapted = (SpeedMeter(config, World(), torch.float32, adapters) for adapters in (0, 1000))
    weights = count_parameters(config).read_per_token
    rows = [meter.measure(tokens=10, squared_lengths=0.0, seconds=1.0, tokens_left=10) for meter in (whole, adapted)]
    assert rows[0]["mfu"] == round(6 * weights * 10 / 1e9, 4)
    assert rows[1]["mfu"] == round((4 * weights + 6 * 1000) * 10 / 1e9, 4)
