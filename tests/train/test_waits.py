"""What a training step asks of a GPU, shown on the meta device, where every number that is read is an error."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from made_rows import RandomRows
from persimmon.config import preset
from persimmon.model import PersimmonModel, attend_documents, staged
from persimmon.train.attention import inside_documents, variable_length
from persimmon.train.loss import chunk_for
from persimmon.train.mesh import Layout
from persimmon.train.objective import AnswerLoss, Objective
from persimmon.train.optimizer import MatrixParameter, Muon
from persimmon.train.parallel import World
from persimmon.train.passes import Batch, StepPasses
from persimmon.train.preference import PreferenceBatch, PreferenceLoss, PreferenceRecipe
from persimmon.train.settings import LoopRecipe
from persimmon.train.sparsity import lifts
from persimmon.train.transfer import Ahead

META = torch.device("meta")


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the tensors on the device that a program turned into lists; anything else that it reads is refused."""
    sizes: list[int] = []
    plain = torch.Tensor.tolist

    def tolist(tensor: torch.Tensor) -> Any:
        if not tensor.is_meta:
            return plain(tensor)
        sizes.append(tensor.numel())
        return [1.0] * tensor.numel()

    made = torch.tensor

    def tensor(numbers: Any, **options: Any) -> torch.Tensor:
        assert options.get("device") != META, f"{numbers} are copied to the device, which waits for it"
        return made(numbers, **options)

    monkeypatch.setattr(torch.Tensor, "tolist", tolist)
    monkeypatch.setattr(torch, "tensor", tensor)  # its copy cannot be seen by CopiesThatWait
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # it does not know the meta device
    return sizes


class CopiesThatWait(TorchDispatchMode):
    """Lists what is copied to the meta device without `staged`."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        places = {leaf.device.type for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        copied = function.overloadpacket.__name__ in ("_to_copy", "copy_") and places != {"meta"} and result.is_meta
        if copied and not self._is_staged():
            self.found.append(f"{function} {list(result.shape)}")
        return result

    @staticmethod
    def _is_staged() -> bool:
        frame: Any = sys._getframe()
        while frame is not None:
            if frame.f_code is staged.__code__:
                return True
            frame = frame.f_back
        return False


class RowsForAll(RandomRows):
    """Rows with what the objectives of fine-tuning want: seeds, and the two documents of a row as a pair."""

    def batch(self, step: int, rows: Sequence[int]) -> Batch:
        plain = super().batch(step, rows)
        chosen = tuple(range(0, 2 * len(rows), 2))
        return PreferenceBatch(
            plain.token_ids, plain.targets, plain.documents, tuple(rows), chosen, torch.zeros(len(rows))
        )


OBJECTIVES = {
    "tokens": None,
    "answers": AnswerLoss(),
    "noise": AnswerLoss(neftune_alpha=5.0),
    "preferences": PreferenceLoss(PreferenceRecipe()),
}


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=list(OBJECTIVES))
def test_a_step_reads_from_the_device_once(read: list[int], objective: Objective | None) -> None:
    model = PersimmonModel(preset("test")).to(META)
    recipe = LoopRecipe(micro_tokens=32, sparsity_target=0.9)
    passes = StepPasses(model, RowsForAll(), recipe, World(device=META), Layout(), 4, objective)
    with CopiesThatWait() as copies:
        result = passes.run(0, penalty=0.5)
    assert not copies.found
    layers, buckets = model.config.num_layers, 8
    assert read == [2 * layers + 1 + 2 * buckets + 1]
    assert all(p.grad is not None for p in model.parameters())
    assert lifts(result.active, 0.9).shape == (layers, model.config.intermediate_size)
    assert len(read) == 1


def test_muon_reads_nothing(read: list[int]) -> None:
    parameters = [torch.nn.Parameter(torch.empty(shape, device=META)) for shape in ((48, 16), (64, 16), (16, 64))]
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    matrices = [MatrixParameter(parameters[0], (2, 8)), *map(MatrixParameter, parameters[1:])]
    Muon(matrices, 0.02, weight_decay=0.1, dtype=torch.bfloat16).step()
    assert not read


def test_documents_of_a_gpu_share_one_call_with_gradients(read: list[int]) -> None:
    q, k = (torch.empty(2, 4, 50, 64, device=META, requires_grad=True) for _ in range(2))
    v = torch.empty(2, 50, 4, 3, 64, device=META, dtype=torch.bfloat16, requires_grad=True)
    out = variable_length([0, 20, 50, 100], META)(0, q, k, v.unbind(3)[2].transpose(1, 2))
    assert (out.shape, out.dtype) == (q.shape, torch.bfloat16)
    out.float().sum().backward()
    assert q.grad is not None and v.grad is not None and q.grad.dtype is torch.float32
    assert not read


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "capability", "flash"),
    [
        ("cuda", torch.bfloat16, 64, (9, 0), True),
        ("cuda", torch.bfloat16, 192, (8, 0), True),
        ("cpu", torch.bfloat16, 64, (9, 0), False),
        ("cuda", torch.float32, 64, (9, 0), False),
        ("cuda", torch.bfloat16, 64, (7, 5), False),
        ("cuda", torch.bfloat16, 60, (9, 0), False),
        ("cuda", torch.bfloat16, 256, (9, 0), False),
    ],
)
def test_only_a_gpu_that_knows_them_takes_the_flash_kernels(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    dtype: torch.dtype,
    head_dim: int,
    capability: tuple[int, int],
    flash: bool,
) -> None:
    chosen: list[Any] = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr("persimmon.train.attention.variable_length", lambda *arguments: chosen.append(arguments))
    inside_documents([0, 3, 8], 1, 8, head_dim, torch.device(device), dtype)
    assert chosen == ([([0, 3, 8], torch.device(device))] if flash else [])


def test_chunks_of_logits_are_larger_on_a_gpu_and_never_small() -> None:
    gpu = torch.device("cuda")
    assert [chunk_for(gpu, size) for size in (8_192, 262_144)] == [4_096, 512]
    assert chunk_for(torch.device("cpu"), 8_192) == 512


def test_batches_are_made_ahead_one_step_and_no_further() -> None:
    made: list[int] = []

    def make(step: int) -> int:
        made.append(step)
        return 10 * step

    ahead = Ahead(make, num_steps=4)
    assert [ahead.take(step) for step in (0, 1)] == [0, 10]
    assert [ahead.take(step) for step in (3,)] == [30]  # after a resume
    ahead._thread.shutdown()
    assert made == [0, 1, 2, 3]


def test_an_error_on_the_way_is_raised_where_the_batch_is_taken() -> None:
    def make(step: int) -> int:
        if step:
            raise ValueError("torn shard")
        return 0

    ahead = Ahead(make, num_steps=3)
    assert ahead.take(0) == 0
    with pytest.raises(ValueError, match="torn shard"):
        ahead.take(1)


def test_staging_leaves_the_cpu_alone() -> None:
    numbers = torch.arange(3)
    assert staged(numbers, torch.device("cpu")) is numbers


@pytest.mark.parametrize("device", ["mps", "cuda"])
def test_only_pinned_memory_is_copied_without_waiting(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """A copy that nobody waits for reads its source later: on MPS from memory that is given away already."""
    calls: list[Any] = []
    numbers, pinned = torch.arange(3), torch.arange(3)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *where, **how: calls.append((tensor is pinned, where, how)))
    staged(numbers, torch.device(device))
    where = (torch.device(device),)
    assert calls == ([(True, where, {"non_blocking": True})] if device == "cuda" else [(False, where, {})])


def test_the_flash_call_gets_documents_as_the_operator_wants_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator's contract played on the CPU: a whole step then has the loss and gradients of the plain form."""

    def operator(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any, **options: Any) -> tuple[torch.Tensor]:
        starts, ends, longest, _, dropout, causal = rest
        assert {x.dtype for x in (q, k, v)} == {torch.bfloat16} and all(x.stride(-1) == 1 for x in (q, k, v))
        assert starts.dtype is torch.int32 and torch.equal(starts, ends) and (dropout, causal) == (0.0, True)
        assert longest == int(starts.diff().max())
        heads_first = [x.transpose(0, 1)[None] for x in (q, k, v)]
        out = attend_documents(*heads_first, starts.tolist())
        return (out[0].transpose(0, 1),)

    def gradients() -> tuple[float, torch.Tensor]:
        model = PersimmonModel(preset("test"))
        model.initialize(torch.Generator().manual_seed(0), std=0.1)
        recipe = LoopRecipe(dtype="bfloat16", kernels="plain", micro_tokens=64)
        result = StepPasses(model, RandomRows(), recipe, World(), Layout(), 4).run(0)
        return result.loss, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    loss, plain = gradients()
    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", operator)
    monkeypatch.setattr(
        "persimmon.train.passes.inside_documents",
        lambda documents, rows, tokens, head_dim, device, dtype: variable_length(documents, device),
    )
    flash_loss, flash = gradients()
    assert flash_loss == pytest.approx(loss, abs=1e-3)
    assert float((flash - plain).norm()) < 0.02 * float(plain.norm())
