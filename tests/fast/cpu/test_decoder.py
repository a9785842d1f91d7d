"""The whole decoder: right numbers; the same bits for every thread count, batch and, but for AMX, instruction set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from made_models import sparse_model
from packed_layouts import ISAS, same_bits
from persimmon.checkpoints import hub
from persimmon.config import preset
from persimmon.errors import CheckpointError, ContextLengthError, InputError, UnavailableError
from persimmon.fast.cpu.decoder import CpuDecoder
from persimmon.fast.cpu.load import load_decoder
from persimmon.fast.cpu.quantize import quantize
from persimmon.fast.cpu.synthesize import synthesize
from persimmon.infer.decoder import Chunk
from scripted_decoder import ScriptedSequence

FORMATS = ("bfloat16", "q8", "q4", "p44")
IDS = np.random.default_rng(0).integers(0, 4_500, 48).tolist()


def directory_of(name: str, checkpoint: Path, packed: dict[str, Path]) -> Path:
    return checkpoint if name == "bfloat16" else packed[name]


def all_logits(decoder: CpuDecoder, ids: list[int] = IDS) -> np.ndarray:
    sequence = decoder.new_sequence(len(ids))
    (logits,) = decoder.forward([Chunk(sequence, ids, "all")])
    sequence.close()
    assert logits is not None
    return logits


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> np.ndarray:
    model = hub.load_model(checkpoint, dtype=torch.float32)
    with torch.inference_mode():
        return model(torch.tensor([IDS]))[0].numpy()


def kl(exact: np.ndarray, other: np.ndarray) -> float:
    p, q = (torch.log_softmax(torch.from_numpy(x), -1) for x in (exact, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("isa", ISAS)
def test_plain_weights_give_the_reference_logits(isa: str, checkpoint: Path, reference: np.ndarray) -> None:
    decoder = load_decoder(checkpoint, isa=isa)
    assert (decoder.form.name, decoder.kv_dtype) == ("bfloat16", "float32")
    np.testing.assert_allclose(all_logits(decoder), reference, rtol=1e-4, atol=1e-4)


def test_float32_copies_give_the_same_as_bfloat16_files(checkpoint: Path, tmp_path: Path) -> None:
    wide = tmp_path / "wide"
    hub.save_model(hub.load_model(checkpoint, dtype=torch.float32), None, wide)
    decoder = load_decoder(wide)
    assert decoder.form.name == "float32"
    narrow = load_decoder(wide, dtype="bfloat16")
    assert np.array_equal(all_logits(narrow), all_logits(load_decoder(checkpoint)))
    np.testing.assert_allclose(all_logits(narrow), all_logits(decoder), rtol=0, atol=1e-5)
    for isa in same_bits("bfloat16")[0]:
        one, other = (load_decoder(directory, isa=isa) for directory in (wide, checkpoint))
        assert np.array_equal(all_logits(one), all_logits(other))


@pytest.mark.parametrize(("name", "limit"), [("q8", 2e-3), ("p44", 0.1), ("q4", 0.15)])
def test_packed_formats_stay_close(name: str, limit: float, packed: dict[str, Path], reference: np.ndarray) -> None:
    """KL to float32; random weights of this size are harsher than trained ones."""
    assert kl(reference, all_logits(load_decoder(packed[name]))) < limit


def test_the_default_margin_costs_less_than_a_tenth_of_the_format(
    packed: dict[str, Path], reference: np.ndarray
) -> None:
    exact = kl(reference, all_logits(load_decoder(packed["p44"], sparsity_margin=float("inf"))))
    default = kl(reference, all_logits(load_decoder(packed["p44"])))
    assert abs(default - exact) < exact / 10


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
def test_same_bits_whatever_runs_it(name: str, kv_dtype: str, checkpoint: Path, packed: dict[str, Path]) -> None:
    directory = directory_of(name, checkpoint, packed)
    firsts = []
    for isas in same_bits(name):
        results = [
            all_logits(load_decoder(directory, kv_dtype=kv_dtype, threads=threads, isa=isa, verify=False))
            for isa in isas
            for threads in (1, 2, 3)
        ]
        for other in results[1:]:
            assert np.array_equal(results[0], other)
        firsts.append(results[0])
    if kv_dtype == "float32":  # rounding to int8 makes more of a last digit
        np.testing.assert_allclose(firsts[0], firsts[-1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
@pytest.mark.parametrize("heads", [3, 40])
def test_any_number_of_heads_and_threads(heads: int, kv_dtype: str, tmp_path: Path) -> None:
    """A token alone, whose heads a thread takes together, has the bits of a token in a prompt."""
    shape = {"hidden_size": 8 * heads, "num_heads": heads, "intermediate_size": 256, "num_layers": 2}
    synthesize(preset("mini", vocab_size=512, max_positions=128, **shape), tmp_path / "model", "q8")
    ids = [5, 6, 7, *range(20, 60)]
    for isa in ISAS:
        for threads in (1, 2, 3):
            decoder = load_decoder(tmp_path / "model", threads=threads, kv_dtype=kv_dtype, isa=isa)
            rows = all_logits(decoder, ids)
            sequence = decoder.new_sequence(len(ids))
            decoder.forward([Chunk(sequence, ids[:20], "none")])
            for position, token in enumerate(ids[20:], 20):
                (row,) = decoder.forward([Chunk(sequence, [token])])
                assert row is not None and np.array_equal(row, rows[position]), (isa, threads, position)


@pytest.mark.parametrize("name", FORMATS)
def test_same_bits_for_every_cut_and_company(name: str, checkpoint: Path, packed: dict[str, Path]) -> None:
    """Token by token, in uneven chunks, and beside other sequences: exactly what one prefill gives."""
    decoder = load_decoder(directory_of(name, checkpoint, packed), threads=2)
    expected = all_logits(decoder)
    single = decoder.new_sequence(48)
    steps = [decoder.forward([Chunk(single, [token])])[0] for token in IDS]
    assert np.array_equal(np.stack(steps), expected)

    ragged, others = decoder.new_sequence(48), [decoder.new_sequence(48) for _ in range(3)]
    rows, start = [], 0
    for size in (1, 2, 3, 5, 13, 24):
        chunks = [Chunk(other, IDS[size : size + 1 + i]) for i, other in enumerate(others)]
        rows.append(decoder.forward([*chunks, Chunk(ragged, IDS[start : start + size], "all")])[-1])
        start += size
    assert np.array_equal(np.concatenate(rows), expected)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_steps_of_many_tokens_give_the_same_bits(threads: int, checkpoint: Path) -> None:
    """Several sequences in steps of up to 256 tokens, cut into groups for threads (native/wide_step.cpp)."""
    decoder = load_decoder(checkpoint, threads=threads)
    texts = [np.random.default_rng(i).integers(0, 4_500, size).tolist() for i, size in enumerate((70, 1, 130, 33, 97))]
    alone = []
    for text in texts:
        sequence = decoder.new_sequence(len(text))
        alone.append(np.stack([decoder.forward([Chunk(sequence, [token])])[0] for token in text]))
    sequences = [decoder.new_sequence(len(text)) for text in texts]
    together = decoder.forward([Chunk(s, text, "all") for s, text in zip(sequences, texts, strict=True)])
    for one, rows in zip(alone, together, strict=True):
        assert np.array_equal(rows, one)
    scored = decoder.score([Chunk(decoder.new_sequence(len(text)), text) for text in texts], texts)
    for one, text, found in zip(alone, texts, scored, strict=True):
        exact = torch.log_softmax(torch.from_numpy(one).double(), -1).numpy()[np.arange(len(text)), text]
        np.testing.assert_allclose(found.log_probabilities, exact, rtol=0, atol=2e-6)
    again = decoder.score([Chunk(decoder.new_sequence(70), texts[0][:7])], [texts[0][:7]])[0]
    assert np.array_equal(again.log_probabilities, scored[0].log_probabilities[:7])


@pytest.mark.parametrize("name", FORMATS)
def test_scores_are_those_of_the_logits_and_the_same_for_every_cut(
    name: str, checkpoint: Path, packed: dict[str, Path]
) -> None:
    directory = directory_of(name, checkpoint, packed)
    targets = [*IDS[1:], 0]
    for isas in same_bits(name):
        check_scores(directory, isas, targets)


def check_scores(directory: Path, isas: list[str], targets: list[int]) -> None:
    logits = all_logits(load_decoder(directory, isa=isas[0], verify=False))
    exact = torch.log_softmax(torch.from_numpy(logits).double(), -1).numpy()[np.arange(48), targets]
    results = []
    for isa in isas:
        decoder = load_decoder(directory, threads=2, isa=isa, verify=False)
        whole, one, other = (decoder.new_sequence(48) for _ in range(3))
        (found,) = decoder.score([Chunk(whole, IDS)], [targets])
        parts = [
            decoder.score([Chunk(one, [token])], [[target]])[0] for token, target in zip(IDS, targets, strict=True)
        ]
        results += [found.log_probabilities, np.concatenate([part.log_probabilities for part in parts])]
        last = decoder.score([Chunk(other, IDS)], [targets[-5:]])[0]  # only the end of a chunk
        assert np.array_equal(last.log_probabilities, found.log_probabilities[-5:])
        assert np.array_equal(found.likeliest, logits.argmax(-1))
        assert np.array_equal(np.concatenate([part.likeliest for part in parts]), found.likeliest)
    np.testing.assert_allclose(results[0], exact, rtol=0, atol=2e-6)  # float32 exponentials of 4,500 logits
    for result in results[1:]:
        assert np.array_equal(result, results[0])


def test_wrong_targets_are_refused_before_anything_runs(checkpoint: Path) -> None:
    decoder = load_decoder(checkpoint)
    sequence = decoder.new_sequence(8)
    with pytest.raises(InputError, match="2 targets for a chunk of 1 tokens"):
        decoder.score([Chunk(sequence, [1])], [[2, 3]])
    with pytest.raises(InputError, match="the targets holds token id"):
        decoder.score([Chunk(sequence, [1])], [[10**6]])
    assert sequence.length == 0
    (nothing,) = decoder.score([Chunk(sequence, [1, 2])], [[]])
    assert nothing.log_probabilities.size == 0 and sequence.length == 2


@pytest.mark.parametrize("name", ["q8", "q4", "p44"])
@pytest.mark.parametrize("top", [1, 5, 64])
def test_two_pass_head_returns_the_exact_largest(name: str, top: int, packed: dict[str, Path]) -> None:
    decoder = load_decoder(packed[name])
    full = all_logits(decoder)
    sequence = decoder.new_sequence(48)
    (rows,) = decoder.forward([Chunk(sequence, IDS, "all")], exact_top=top)
    for exact, found in zip(full, rows, strict=True):
        best = np.argsort(-exact)[:top]
        assert np.array_equal(found[best], exact[best])
        assert np.all(np.isneginf(found) | (found == exact))
    # Random logits lie so close that six deviations of the top two bits leave out few words below the 64 largest.
    assert np.isneginf(rows).mean() > (0.5 if top < 64 else 0.2)


def largest_are_exact(decoder: CpuDecoder, top: int, ids: list[int] = IDS) -> float:
    """Check step after step against the whole head, to the bit; the share of logits that were left out."""
    full, sequence, rows = all_logits(decoder, ids), decoder.new_sequence(len(ids)), []
    for token, exact in zip(ids, full, strict=True):
        (found,) = decoder.forward([Chunk(sequence, [token])], exact_top=top)
        assert found is not None and found.argmax() == exact.argmax()
        best = np.argsort(-exact, kind="stable")[:top]
        assert np.array_equal(found[best], exact[best])
        assert np.all(np.isneginf(found) | (found == exact))
        rows.append(np.isneginf(found).mean())
    return float(np.mean(rows))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("top", [1, 5, 64])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_sketch_of_a_float_head_finds_the_exact_largest(isa: str, top: int, dtype: str, checkpoint: Path) -> None:
    assert largest_are_exact(load_decoder(checkpoint, isa=isa, dtype=dtype), top) > 0.5


def with_head(checkpoint: Path, directory: Path, change: Callable[[torch.Tensor], None]) -> CpuDecoder:
    model = hub.load_model(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        change(model.lm_head.weight)
    hub.save_model(model, None, directory)
    return load_decoder(directory)


def test_sketch_of_rows_that_are_nearly_equal(checkpoint: Path, tmp_path: Path) -> None:
    def nearly_equal(weight: torch.Tensor) -> None:  # no int8 number tells them apart, and some are the same
        weight[:] = weight[:1] * (1 + 1e-6 * torch.arange(len(weight), dtype=torch.float32)[:, None].remainder(7))

    assert largest_are_exact(with_head(checkpoint, tmp_path / "equal", nearly_equal), 1) < 0.9


def test_sketch_of_outliers_and_of_empty_rows(checkpoint: Path, tmp_path: Path) -> None:
    def uneven(weight: torch.Tensor) -> None:
        weight[::2, ::32] *= 1000
        weight[1::4] = 0

    largest_are_exact(with_head(checkpoint, tmp_path / "uneven", uneven), 5)


def test_rows_that_int8_cannot_hold_are_read(checkpoint: Path, tmp_path: Path) -> None:
    def huge(weight: torch.Tensor) -> None:
        weight[7], weight[8], weight[9] = 1e30, 1e-42, 0.0

    largest_are_exact(with_head(checkpoint, tmp_path / "huge", huge), 1)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_sketched_neurons_change_no_bit(isa: str, dtype: str, checkpoint: Path) -> None:
    decoder = load_decoder(checkpoint, isa=isa, dtype=dtype)
    together = all_logits(decoder)  # many tokens in one step, without a sketch
    decoder.reset_counts()
    sequence = decoder.new_sequence(len(IDS))
    rows = [decoder.forward([Chunk(sequence, [token])])[0] for token in IDS]
    assert np.array_equal(np.stack([row for row in rows if row is not None]), together)
    for layer in decoder.layer_counts():
        assert layer["active"] <= layer["candidates"] < layer["tokens"] * decoder.config.intermediate_size


def test_the_audit_finds_nothing_that_a_sketch_missed(checkpoint: Path) -> None:
    decoder = load_decoder(checkpoint, audit_every=2)
    sequence = decoder.new_sequence(len(IDS))
    for token in IDS:
        decoder.forward([Chunk(sequence, [token])])
    for layer in decoder.layer_counts():
        assert layer["audited"] == len(IDS) // 2 and layer["audited_missed"] == layer["audited_error"] == 0


def test_a_layer_with_few_zeros_does_without_its_sketch(checkpoint: Path, tmp_path: Path) -> None:
    model = sparse_model(load_decoder(checkpoint).config)
    with torch.no_grad():
        model.layers[0].mlp.dense_h_to_4h.bias.add_(2)
    hub.save_model(model, None, tmp_path / "active")
    decoder = load_decoder(tmp_path / "active")
    together = all_logits(decoder)
    decoder.reset_counts()
    sequence = decoder.new_sequence(len(IDS))
    rows = [decoder.forward([Chunk(sequence, [token])])[0] for token in IDS]
    assert np.array_equal(np.stack([row for row in rows if row is not None]), together)
    neurons = decoder.config.intermediate_size
    shares = [layer["candidates"] / layer["tokens"] / neurons for layer in decoder.layer_counts()]
    assert shares[0] > 0.95 and max(shares[1:]) < 0.5


@pytest.mark.parametrize("vocab", [4_096, 4_097, 4_112, 5_120, 5_185])
def test_heads_of_all_sizes(vocab: int, checkpoint: Path, tmp_path: Path) -> None:
    config = replace(load_decoder(checkpoint).config, vocab_size=vocab)
    hub.save_model(sparse_model(config), None, tmp_path / "model")
    ids = [token % vocab for token in IDS]
    shares = [
        largest_are_exact(load_decoder(tmp_path / "model", dtype=kind), 256, ids) for kind in ("bfloat16", "float32")
    ]
    assert all(share == 0 for share in shares) if vocab == 4_096 else min(shares) > 0.1


NO_IDS = np.empty(0, np.int64)


@pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
@pytest.mark.parametrize("name", FORMATS)
def test_greedy_steps_pick_what_logits_say(name: str, kv_dtype: str, checkpoint: Path, packed: dict[str, Path]) -> None:
    decoder = load_decoder(directory_of(name, checkpoint, packed), kv_dtype=kv_dtype)
    sequence = decoder.new_sequence(64)
    decoder.forward([Chunk(sequence, IDS[:20], "none")])
    token, expected = 7, []
    for _ in range(12):
        (row,) = decoder.forward([Chunk(sequence, [token])], exact_top=1)
        assert row is not None
        expected.append(token := int(row.argmax()))

    def greedy(count: int, banned: np.ndarray = NO_IDS, stop_id: int = -1) -> list[int]:
        sequence.truncate(20)
        picked = decoder.greedy(sequence, 7, count, banned, stop_id)
        assert sequence.length == 20 + len(picked)
        return picked

    assert greedy(12) == expected and greedy(1) == expected[:1]
    middle = expected[5]
    assert greedy(12, stop_id=middle) == expected[: expected.index(middle) + 1]
    banned = np.array(sorted(set(expected)))
    others = greedy(12, banned)
    assert len(others) == 12 and not set(others) & set(expected)
    sequence.truncate(20)
    (row,) = decoder.forward([Chunk(sequence, [7])])
    assert row is not None
    row[banned] = -np.inf
    assert others[0] == int(row.argmax())


def test_greedy_steps_that_cannot_be_are_refused(checkpoint: Path) -> None:
    decoder = load_decoder(checkpoint)
    sequence = decoder.new_sequence(8)
    decoder.forward([Chunk(sequence, IDS[:4], "none")])
    with pytest.raises(ContextLengthError, match="5 more tokens do not fit: 4 of 8"):
        decoder.greedy(sequence, 1, 5, NO_IDS, -1)
    with pytest.raises(InputError, match="outside the vocabulary"):
        decoder.greedy(sequence, 10**6, 1, NO_IDS, -1)
    with pytest.raises(InputError, match="the list of banned tokens holds token id -1"):
        decoder.greedy(sequence, 1, 1, np.array([-1]), -1)
    with pytest.raises(InputError, match="greedy steps must be 1 or more, got 0"):
        decoder.greedy(sequence, 1, 0, NO_IDS, -1)
    with pytest.raises(InputError, match="belongs to another decoder"):
        decoder.greedy(ScriptedSequence(8), 1, 1, NO_IDS, -1)
    assert sequence.length == 4 and len(decoder.greedy(sequence, 1, 4, NO_IDS, -1)) == 4
    sequence.close()
    with pytest.raises(InputError, match="closed"):
        decoder.greedy(sequence, 1, 1, NO_IDS, -1)


def test_exact_mode_reads_the_whole_head(packed: dict[str, Path]) -> None:
    decoder = load_decoder(packed["p44"], sparsity_margin=float("inf"))
    (row,) = decoder.forward([Chunk(decoder.new_sequence(48), IDS)], exact_top=1)
    assert np.isfinite(row).all()


def test_counts_and_audit(packed: dict[str, Path]) -> None:
    decoder = load_decoder(packed["p44"], sparsity_margin=1.0, audit_every=3)
    sequence = decoder.new_sequence(48)
    for token in IDS[:30]:
        decoder.forward([Chunk(sequence, [token])])
    for layer in decoder.layer_counts():
        assert layer["tokens"] == 30 and layer["audited"] == 10
        assert 0 < layer["active"] <= layer["candidates"] < 30 * 600
        assert 0 <= layer["audited_missed"] < 0.05 * layer["audited_active"]
        assert layer["audited_error"] < 1e-3 * layer["audited_norm"]
    decoder.reset_counts()
    assert decoder.layer_counts()[0]["tokens"] == 0


@pytest.mark.parametrize("isa", ISAS)
def test_q4_counts_the_same_in_a_prompt_and_token_by_token(isa: str, packed: dict[str, Path]) -> None:
    """And skipping loses nothing, says the audit."""
    decoder = load_decoder(packed["q4"], isa=isa, audit_every=2)
    prompt, single = decoder.new_sequence(48), decoder.new_sequence(48)
    decoder.forward([Chunk(prompt, IDS)])
    together = decoder.layer_counts()
    decoder.reset_counts()
    for token in IDS:
        decoder.forward([Chunk(single, [token])])
    for layer, expected in zip(decoder.layer_counts(), together, strict=True):
        assert all(layer[name] == expected[name] for name in ("tokens", "candidates", "active", "groups"))
        assert 0 < layer["groups"] <= layer["active"] < layer["candidates"] == len(IDS) * 600
        assert layer["audited"] == len(IDS) // 2 and layer["audited_missed"] == layer["audited_error"] == 0


def test_q4_of_wide_models_in_long_steps(tmp_path: Path) -> None:
    """Scratch memory holds some of the columns: one thread, which gets all of them, takes them in pieces."""
    shape = {"hidden_size": 1_024, "intermediate_size": 300, "num_layers": 1, "num_heads": 16}
    config = preset("test", **shape)
    synthesize(config, tmp_path / "wide", "q4", active=0.5)
    ids = np.random.default_rng(1).integers(0, config.vocab_size, 256).tolist()
    first, *others = (all_logits(load_decoder(tmp_path / "wide", threads=threads), ids) for threads in (1, 2, 3))
    for other in others:
        assert np.array_equal(first, other)


def test_auditing_changes_no_result(packed: dict[str, Path]) -> None:
    def run(audit_every: int) -> list[np.ndarray]:
        decoder = load_decoder(packed["p44"], audit_every=audit_every)
        sequence = decoder.new_sequence(48)
        return [decoder.forward([Chunk(sequence, [token])])[0] for token in IDS[:8]]

    assert np.array_equal(run(0), run(1))


def test_weights_that_overflow_are_refused_and_the_sequence_keeps_its_length(checkpoint: Path, tmp_path: Path) -> None:
    model = hub.load_model(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        model.layers[0].mlp.dense_h_to_4h.weight.fill_(1e30)
    hub.save_model(model, None, tmp_path / "wild")
    decoder = load_decoder(tmp_path / "wild")
    sequence = decoder.new_sequence(8)
    with pytest.raises(CheckpointError, match="not finite"):
        decoder.forward([Chunk(sequence, [1, 2, 3])])
    with pytest.raises(CheckpointError, match="not finite"):
        decoder.greedy(sequence, 1, 3, NO_IDS, -1)
    assert sequence.length == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_greedy_steps_refuse_logits_that_are_no_numbers(value: float, checkpoint: Path, tmp_path: Path) -> None:
    model = hub.load_model(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        dict(model.named_parameters())["lm_head.weight"][77] = value
    hub.save_model(model, None, tmp_path / "wild")
    decoder = load_decoder(tmp_path / "wild")
    sequence = decoder.new_sequence(8)
    with pytest.raises(CheckpointError, match="no usable logits"):
        decoder.greedy(sequence, 1, 3, NO_IDS, -1)
    assert sequence.length == 0


def test_squares_too_large_for_rounding_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    """One token and many: infinite squares have no int8 codes, which must not pass for zeros."""
    model = hub.load_model(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        model.layers[0].post_attention_layernorm.weight.fill_(1e8)
        weight = model.layers[0].mlp.dense_h_to_4h.weight.fill_(4e5)
        weight[:, 0] *= -1  # as normed inputs add up to zero
        weight[::2] *= -1
    hub.save_model(model, None, tmp_path / "wild")
    quantize(tmp_path / "wild", tmp_path / "q4", "q4")
    decoder = load_decoder(tmp_path / "q4")
    for ids in ([1], [1, 2, 3], IDS):
        with pytest.raises(CheckpointError, match="not finite"):
            decoder.forward([Chunk(decoder.new_sequence(48), ids)])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"threads": 0}, InputError, "threads must be from 1 to 1024, got 0"),
        ({"kv_dtype": "float16"}, InputError, "kv_dtype of the cpu engine must be one of auto, float32, int8"),
        ({"sparsity_margin": -1.0}, InputError, "sparsity_margin must be from 0 to inf, got -1.0"),
        ({"sparsity_margin": float("nan")}, InputError, "sparsity_margin"),
        ({"audit_every": -1}, InputError, "audit_every"),
        ({"isa": "sse9"}, UnavailableError, "there are: auto, portable"),
    ],
)
def test_bad_options_are_refused(options: dict, error: type, message: str, checkpoint: Path) -> None:
    with pytest.raises(error, match=message):
        load_decoder(checkpoint, **options)
