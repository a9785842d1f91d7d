"""Runs spread over processes equal the run of one: sharded (FSDP2), tensor and context parallel, and their mixtures.

The test model, 50 steps, float32. The layouts add the same numbers in another order; the loss of step 50 may differ by
what AdamW and Muon make of that.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from made_rows import RandomRows
from persimmon.config import preset
from persimmon.errors import ConfigError
from persimmon.model import PersimmonModel, attend_documents
from persimmon.train import optimizer
from persimmon.train.attention import context_parallel, own_positions
from persimmon.train.loop import LoopRecipe, Trainer
from persimmon.train.loss import IGNORE, cross_entropy_by_position
from persimmon.train.mesh import ParallelRecipe, make_layout
from persimmon.train.optimizer import OptimizerRecipe
from persimmon.train.parallel import World, run_processes

STEPS = 50
TOLERANCE = 2e-4  # nats after 50 steps; the losses are near 5.8


def build(directory: Path, world: World, parallel: ParallelRecipe, matrices: str = "adamw") -> Trainer:
    model = PersimmonModel(preset("test", hidden_size=32, num_heads=4, intermediate_size=64))
    model.initialize(torch.Generator().manual_seed(0), std=0.1)
    # Rates at which the loss falls steadily: a run near the edge of stability would amplify any rounding.
    settings = OptimizerRecipe(matrices=matrices, matrix_lr=2e-3, vector_lr=2e-3)
    recipe = LoopRecipe(
        parallel=parallel, optimizer=settings, micro_tokens=64, evaluate_every=0,
        sparsity_penalty=0.1, sparsity_target=0.7, sparsity_lift=0.5,
    )  # fmt: skip
    return Trainer(model, RandomRows(rows=4, length=32), STEPS, recipe, directory, world)


def train(world: World, directory: Path, parallel: ParallelRecipe, matrices: str) -> None:
    torch.set_num_threads(1)
    trainer = build(directory, world, parallel, matrices)
    rows = [trainer.train_step() for _ in range(STEPS)]
    model = trainer.whole_model()
    if world.is_main:
        weights = {name: p.detach().double().norm().item() for name, p in model.named_parameters()}
        found = {
            "loss": [r["loss"] for r in rows],
            "norm": [r["grad_norm"] for r in rows],
            "zeros": rows[0]["zeros"],
            "weights": weights,
        }
        (directory / "found.json").write_text(json.dumps(found))


def found(directory: Path, size: int, parallel: ParallelRecipe, matrices: str) -> dict[str, Any]:
    directory.mkdir(exist_ok=True)
    run_processes(size, train, directory, parallel, matrices)
    return json.loads((directory / "found.json").read_text())


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    root = tmp_path_factory.mktemp("alone")
    return {kind: found(root / kind, 1, ParallelRecipe(), kind) for kind in ("adamw", "muon")}


LAYOUTS = {
    "fsdp-2": (2, ParallelRecipe(shard=True), "adamw"),
    "fsdp-4-muon": (4, ParallelRecipe(shard=True), "muon"),
    "tensor-2": (2, ParallelRecipe(tensor=2), "adamw"),
    "context-2": (2, ParallelRecipe(context=2), "adamw"),
    "context-4-sharded": (4, ParallelRecipe(context=4, shard=True), "adamw"),
    "fsdp-2-tensor-2-muon": (4, ParallelRecipe(tensor=2), "muon"),
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_repeats_the_run_of_one_process(
    layout: str, alone: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    size, parallel, matrices = LAYOUTS[layout]
    result, expected = found(tmp_path / "run", size, parallel, matrices), alone[matrices]
    assert expected["loss"][-1] < expected["loss"][0] - 0.01
    assert result["loss"][0] == pytest.approx(expected["loss"][0], abs=2e-6)
    assert result["zeros"] == pytest.approx(expected["zeros"], abs=2e-4)
    assert result["norm"][0] == pytest.approx(expected["norm"][0], abs=1e-4)
    assert result["loss"] == pytest.approx(expected["loss"], abs=TOLERANCE)
    # A shift of all keys changes attention by rotary alone: this gradient is nearly nought, and AdamW, which normalises
    # it, turns its rounding into steps.
    for weights in (result["weights"], expected["weights"]):
        for layer in range(2):
            weights.pop(f"layers.{layer}.self_attn.k_layernorm.bias", None)
    assert result["weights"] == pytest.approx(expected["weights"], rel=1e-3, abs=1e-4)


def count_whole_matrices(world: World, directory: Path) -> None:
    """The most whole matrices that exist in this process at one time during an update by Muon."""
    trainer = build(directory, world, ParallelRecipe(shard=True), "muon")
    storages: list[weakref.ref[torch.UntypedStorage]] = []
    alive: list[int] = []

    def counted(make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
        def made(update: torch.Tensor) -> torch.Tensor:
            full = make(update)
            storages.append(weakref.ref(full.untyped_storage()))
            alive.append(sum(storage() is not None for storage in storages))
            return full

        return made

    with pytest.MonkeyPatch.context() as patch:
        for name in ("whole", "_whole_like"):
            patch.setattr(optimizer, name, counted(getattr(optimizer, name)))
        trainer.train_step()
    (directory / f"alive{world.rank}.json").write_text(json.dumps(alive))


@pytest.mark.slow
def test_an_update_gathers_few_matrices_at_a_time(tmp_path: Path) -> None:
    run_processes(2, count_whole_matrices, tmp_path)
    for rank in range(2):
        alive = json.loads((tmp_path / f"alive{rank}.json").read_text())
        assert len(alive) == 8 + 4  # all are gathered, half of them come back from the other process
        assert max(alive) <= 3  # its own, the one before, and the one that arrives


# -- the parts -----------------------------------------------------------------------------------------


def context_gradients(world: World, directory: Path) -> None:
    """Output and gradients of the shared attention, in float64, against the reference on whole rows."""
    layout = make_layout(world, ParallelRecipe(context=world.size))
    assert layout.context_group is not None
    tokens, documents = 16, [0, 3, 4, 16, 25, 32]
    generator = torch.Generator().manual_seed(1)
    whole = [torch.randn(2, 3, tokens, 4, generator=generator).double() for _ in range(4)]
    q, k, v = (x.clone().requires_grad_() for x in whole[:3])
    (attend_documents(q, k, v, documents) * whole[3]).sum().backward()
    own = own_positions(tokens, world.rank, world.size)
    mine = [x[:, :, own].clone().requires_grad_() for x in whole[:3]]
    out = context_parallel(documents, tokens, layout.context_group)(0, *mine)
    (out * whole[3][:, :, own]).sum().backward()
    torch.testing.assert_close(out.detach(), attend_documents(*whole[:3], documents)[:, :, own], atol=1e-12, rtol=0)
    for part, full in zip(mine, (q, k, v), strict=True):
        assert part.grad is not None and full.grad is not None
        torch.testing.assert_close(part.grad, full.grad[:, :, own], atol=1e-12, rtol=0)
    (directory / f"{world.rank}").touch()


@pytest.mark.parametrize("size", [2, 4])
def test_shared_attention_and_its_gradients_equal_the_reference(size: int, tmp_path: Path) -> None:
    run_processes(size, context_gradients, tmp_path)
    assert len(list(tmp_path.iterdir())) == size


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_token_of_a_row_has_one_holder_and_all_have_equal_causal_work(size: int) -> None:
    parts = [own_positions(12, rank, size) for rank in range(size)]
    assert sorted(torch.cat(parts).tolist()) == list(range(12))
    assert len({int(part.sum()) for part in parts}) == 1


def split_head_loss(world: World, directory: Path) -> None:
    """The head split by pieces of the vocabulary: loss and gradients of the whole one, in float64."""
    from torch.distributed.tensor import Shard, distribute_tensor

    layout = make_layout(world, ParallelRecipe(tensor=world.size))
    assert layout.mesh is not None
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(30, 6, generator=generator).double()
    weight = torch.randn(20, 6, generator=generator).double()
    targets = torch.randint(0, 20, (30,), generator=generator)
    targets[::4] = IGNORE
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    expected, by_position = cross_entropy_by_position(h, w, targets, scale=0.3, chunk=7)
    expected.backward()
    split = distribute_tensor(weight, layout.mesh["tensor"], [Shard(0)]).requires_grad_()
    h2 = hidden.clone().requires_grad_()
    loss, found_by_position = cross_entropy_by_position(h2, split, targets, scale=0.3, chunk=7)
    loss.backward()
    assert h.grad is not None and h2.grad is not None and split.grad is not None
    for a, b in ((loss, expected), (found_by_position, by_position), (h2.grad, h.grad)):
        torch.testing.assert_close(a.detach(), b.detach(), atol=1e-12, rtol=0)
    torch.testing.assert_close(split.grad.full_tensor(), w.grad, atol=1e-12, rtol=0)
    (directory / f"{world.rank}").touch()


def test_a_head_split_by_vocabulary_gives_the_loss_and_gradients_of_the_whole(tmp_path: Path) -> None:
    run_processes(2, split_head_loss, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        (ParallelRecipe(tensor=3), "3 processes|do not divide"),
        (ParallelRecipe(context=4), "2 processes do not divide by parallel.tensor 1 x parallel.context 4"),
    ],
)
def test_processes_that_do_not_divide_are_refused(parallel: ParallelRecipe, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_layout(World(0, 2), parallel)


def wrong_layout(world: World, directory: Path, parallel: ParallelRecipe) -> None:
    build(directory, world, replace(parallel))


def test_an_error_in_a_process_is_raised_in_the_parent_as_itself(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tensor 4"):
        run_processes(2, wrong_layout, tmp_path, ParallelRecipe(tensor=4))
