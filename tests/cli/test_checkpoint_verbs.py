"""`persimmon info | import | export | prune-vocab`, through the front that users call."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from made_checkpoints import made_config, made_model, made_tokenizer, release_state, same_tensors, write_release
from persimmon.checkpoints import releases
from persimmon.checkpoints.adept import md5_of
from persimmon.checkpoints.hub import load_model, save_model
from persimmon.cli.info import size
from persimmon.cli.main import main


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A model with unused rows."""
    tokenizer = made_tokenizer(unused=[270, 280])
    model = made_model(made_config(tokenizer, vocab_size=320), dtype=torch.bfloat16)
    save_model(model, tokenizer, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def tar(directory: Path, tmp_path: Path) -> Path:
    tokenizer = made_tokenizer(unused=[270, 280])
    return write_release(
        tmp_path / "8b_chat_model_release.tar", release_state(load_model(directory)), tokenizer.serialized
    )


def run(capsys: pytest.CaptureFixture[str], *words: Any) -> tuple[int, str, str]:
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# -- info ----------------------------------------------------------------------------------------------------


def test_info_of_the_8b(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "info", "8b", "--json")
    document = json.loads(out)
    assert code == 0
    assert document["parameters"]["total"] == 9_397_175_296
    assert document["kv_bytes_per_token"]["bfloat16"] == 589_824
    assert document["configuration"]["rotary_dim"] == 32
    assert document["bytes_per_token"]["bfloat16"]["dense"] == pytest.approx(16.65e9, rel=1e-3)
    plans = {(p["context"], p["weight_format"], p["kv_dtype"]): p["total_bytes"] for p in document["memory"]}
    assert len(plans) == 4 * 4 * 3
    assert plans[16_384, "bfloat16", "bfloat16"] == 2 * 9_397_175_296 + 9 * 2**30


def test_info_for_people(capsys: pytest.CaptureFixture[str], directory: Path) -> None:
    (directory / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    code, out, err = run(capsys, "info", directory)
    assert (code, err) == (0, "")
    for words in ("15,312 parameters", "bfloat16, ", "36 tensors", "licence: CC-BY-NC-4.0", "4 of 8", "16,384", "q4"):
        assert words in out
    assert max(map(len, out.splitlines())) <= max(80, len(str(directory)) + 25)


def test_info_of_a_directory_reads_headers_only(directory: Path) -> None:
    """No torch, and no error although the numbers are gone: only a sparse file of the right size is left."""
    weights = directory / "model.safetensors"
    data = weights.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    with weights.open("wb") as stream:
        stream.write(data[:header])
        stream.truncate(len(data))
    code = (
        "import sys; from persimmon.cli.main import main; code = main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, "info", str(directory), "--json"], capture_output=True, text=True, check=True
    )
    assert json.loads(result.stdout)["weights"] == {
        "dtype": "bfloat16", "tensors": 36, "files": ["model.safetensors"], "bytes": len(data),
    }  # fmt: skip


def test_info_takes_the_default_model_from_the_environment(
    capsys: pytest.CaptureFixture[str], directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PERSIMMON_MODEL", str(directory))
    assert json.loads(run(capsys, "info", "--json")[1])["path"] == str(directory)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["info", "nothing-like-this"], "no model 'nothing-like-this'"),
        (["info", "8b", "--active", "2"], "active must be a share"),
    ],
)
def test_info_errors(capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, "")
    assert err.startswith("persimmon: error: ") and message in err and err.count("\n") == 1


def test_info_without_weights(capsys: pytest.CaptureFixture[str], directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    assert "the weights are not downloaded" in run(capsys, "info", directory)[1]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1_000, "1.00 kB"), (12_345, "12.3 kB"), (999_499, "999 kB"), (999_500, "1.00 MB"),
     (18_794_350_592, "18.8 GB"), (5e12, "5,000 GB")],
)  # fmt: skip
def test_sizes(count: float, text: str) -> None:
    assert size(count) == text


# -- import --------------------------------------------------------------------------------------------------


def test_import_of_a_release(
    capsys: pytest.CaptureFixture[str], tar: Path, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out_dir = tmp_path / "out"
    code, out, err = run(capsys, "import", tar, out_dir, "--verify", "--compare", directory)
    assert code == 0
    assert same_tensors(load_model(out_dir), load_model(directory))
    assert "36 tensors read back bit for bit" in out and "36 tensors equal, 0 not" in out
    assert "not that of a published release; 8b_chat_model_release.tar has 663aeace" in err
    assert "note: rotary_emb.inv_freq is stored as float32" in err

    # The same file, were it the published one.
    published = releases.Release(
        "persimmon-8b-chat", "adept/persimmon-8b-chat", tar.name, md5_of(tar), "CC-BY-NC-4.0", "x"
    )
    monkeypatch.setattr(releases, "RELEASES", (published,))
    code, out, err = run(capsys, "import", tar, tmp_path / "known", "--json")
    document = json.loads(out)
    assert (document["release"], document["licence"]) == ("persimmon-8b-chat", "CC-BY-NC-4.0")
    assert "warning" not in err and "licence CC-BY-NC-4.0" in err


def test_comparison_reports_differences(
    capsys: pytest.CaptureFixture[str], tar: Path, directory: Path, tmp_path: Path
) -> None:
    tokenizer = made_tokenizer(unused=[270, 280])
    other = load_model(directory)
    with torch.no_grad():
        other.lm_head.weight[0, 0] += 1
    save_model(other, tokenizer, tmp_path / "other")
    code, out, _ = run(capsys, "import", tar, tmp_path / "out", "--compare", tmp_path / "other", "--quiet")
    assert code == 0
    assert "35 tensors equal, 1 not" in out and "lm_head.weight: different values" in out


def test_import_of_a_directory(capsys: pytest.CaptureFixture[str], directory: Path, tmp_path: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(
        json.dumps({**config, "bos_token_id": 5, "eos_token_id": 6, "hidden_dropout": 0.6})
    )
    code, out, err = run(capsys, "import", directory, tmp_path / "out", "--max-shard-gb", "0.001")
    assert code == 0 and "1 file" in out
    assert "bos and eos are 1 in the vocabulary, not 6: corrected" in err
    assert "hidden_dropout 0.6 is metadata" in err
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == 1


def test_verify_finds_damage(capsys: pytest.CaptureFixture[str], directory: Path, tmp_path: Path) -> None:
    weights = directory / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 1
    weights.write_bytes(data)
    code, _, err = run(capsys, "import", directory, tmp_path / "out", "--verify")
    assert code == 2 and "model.safetensors is damaged or was changed" in err
    assert not (tmp_path / "out").exists()


def test_verify_counts_the_files_of_the_source(
    capsys: pytest.CaptureFixture[str], directory: Path, tmp_path: Path
) -> None:
    code, out, _ = run(capsys, "import", directory, tmp_path / "out", "--verify")
    assert code == 0 and "source verified: 7 files" in out


def test_used_directories_need_force(capsys: pytest.CaptureFixture[str], directory: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    for words in (["import", directory], ["export", directory], ["prune-vocab", directory]):
        code, _, err = run(capsys, *words, tmp_path / "out")
        assert code == 2 and "is not empty" in err and "--force" in err
        assert run(capsys, *words, tmp_path / "out", "--force")[0] == 0
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_a_model_is_not_written_over_itself(capsys: pytest.CaptureFixture[str], directory: Path) -> None:
    code, _, err = run(capsys, "export", directory, directory, "--force")
    assert code == 2 and "is the model itself" in err
    load_model(directory)


def test_a_hostile_file_ends_in_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(b"\x80\x02cos\nsystem\nX\x01\x00\x00\x00x\x85R.")
    code, _, err = run(capsys, "import", tmp_path / "x.pt", tmp_path / "out")
    assert code == 2 and err.count("\n") == 1 and "refused: the pickle names os.system" in err


# -- export and prune-vocab ----------------------------------------------------------------------------------


def test_export(capsys: pytest.CaptureFixture[str], directory: Path, tmp_path: Path) -> None:
    code, out, _ = run(capsys, "export", directory, tmp_path / "out", "--dtype", "float32", "--verify", "--json")
    document = json.loads(out)
    assert code == 0 and (document["dtype"], document["verified_tensors"]) == ("float32", 36)
    assert same_tensors(load_model(tmp_path / "out"), load_model(directory, dtype=torch.float32))
    code, _, err = run(capsys, "export", directory, tmp_path / "x", "--max-shard-gb", "0")
    assert code == 2 and "--max-shard-gb" in err


def test_a_damaged_source_is_not_copied(capsys: pytest.CaptureFixture[str], directory: Path, tmp_path: Path) -> None:
    damaged = shutil.copytree(directory, tmp_path / "damaged")
    content = bytearray((damaged / "model.safetensors").read_bytes())
    content[-2] ^= 1
    (damaged / "model.safetensors").write_bytes(content)
    for verb in ("export", "prune-vocab", "import"):
        code, _, err = run(capsys, verb, damaged, tmp_path / "out")
        assert code == 2 and "model.safetensors is damaged or was changed" in err, verb
        assert not (tmp_path / "out").exists()


def test_prune_and_restore(capsys: pytest.CaptureFixture[str], directory: Path, tmp_path: Path) -> None:
    code, out, _ = run(capsys, "prune-vocab", directory, tmp_path / "pruned")
    assert code == 0 and "294 of 320 vocabulary rows are kept" in out
    code, out, _ = run(capsys, "prune-vocab", tmp_path / "pruned", tmp_path / "restored", "--restore", "--json")
    assert code == 0 and json.loads(out)["original_rows"] == 320
    assert same_tensors(load_model(tmp_path / "restored"), load_model(directory))
    code, _, err = run(capsys, "prune-vocab", directory, tmp_path / "x", "--restore", "--discard")
    assert code == 2 and "--restore takes neither" in err
