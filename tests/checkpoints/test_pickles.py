"""Hostile and damaged torch files: nothing runs, nothing large is allocated, the refusal has a name."""

from __future__ import annotations

import collections
import contextlib
import io
import os
import pickle
import struct
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from persimmon.checkpoints import pickles
from persimmon.checkpoints.torch_files import open_torch_file, read_torch_file
from persimmon.errors import CheckpointError, NotFoundError


class Reduce:
    """Pickles as a call of `function` with `arguments`."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def zipped(data: bytes, **entries: bytes) -> bytes:
    """A torch archive around a pickle."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        for name, content in entries.items():
            archive.writestr(f"archive/{name}", content)
    return stream.getvalue()


def legacy(data: bytes) -> bytes:
    """The old layout around a pickle."""
    facts = {"protocol_version": 1001, "little_endian": True, "type_sizes": {}}
    return (
        b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, facts)) + data + pickle.dumps([], 2)
    )


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "x.pt"


FIRED: list[str] = []


def canary(*arguments: Any) -> None:
    """Called only if a pickle was executed."""
    FIRED.append("canary")


@pytest.fixture
def tripwire(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a pickle made run."""
    FIRED.clear()
    monkeypatch.setattr(os, "system", lambda command: FIRED.append(command))
    return FIRED


HOSTILE = {
    "canary": Reduce(canary),
    "os.system": Reduce(os.system, "touch /tmp/owned"),
    "nested": {"model": [Reduce(os.system, "x")]},
    "argument": collections.OrderedDict(a=Reduce(print, Reduce(os.system, "x"))),
    "getattr": Reduce(getattr, Reduce(__import__, "os"), "system"),
    "class": Reduce(type, "X", (), {}),
    "partial": Reduce(__import__("functools").partial, os.system, "x"),
    "open": Reduce(open, "/tmp/owned", "w"),
    "load": Reduce(pickle.loads, b"cos\nsystem\n."),
    "torch": Reduce(torch.load, "x"),
    "bytearray": Reduce(bytearray, 10**12),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("layout", [zipped, legacy])
def test_hostile_pickles_are_refused_by_name(
    file: Path, tripwire: list[str], name: str, protocol: int, layout: Any
) -> None:
    file.write_bytes(layout(pickle.dumps(HOSTILE[name], protocol)))
    with pytest.raises(CheckpointError, match=r"refused: the pickle names \S+, which no checkpoint needs") as caught:
        open_torch_file(file)
    assert str(file) in str(caught.value)
    assert tripwire == []
    assert not Path("/tmp/owned").exists()


@pytest.mark.parametrize(
    "program",
    [
        b"cos\nsystem\n(S'x'\ntR.",  # protocol 0: text strings
        b"\x80\x02cos\nsystem\nX\x01\x00\x00\x00x\x85R.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x01x\x85R.",
        b"(ios\nsystem\n.",  # INST
        b"(cos\nsystem\no.",  # OBJ
        b"\x80\x02\x82\x01.",  # EXT1
        b"\x80\x02ccollections\nOrderedDict\n)R}(X\x01\x00\x00\x00ac__builtin__\neval\nub.",
        b"\x80\x02X\x02\x00\x00\x00osX\x06\x00\x00\x00system\x93.",  # STACK_GLOBAL with memoized parts
        b"\x80\x02cnumpy.ndarray.__class__\nmro\n.",
        b"\x80\x02cmegatron\x00os\nsystem\n.",
    ],
)
def test_programs_that_reach_for_code(file: Path, tripwire: list[str], program: bytes) -> None:
    for layout in (zipped, legacy):
        file.write_bytes(layout(program))
        with pytest.raises(CheckpointError):
            open_torch_file(file)
    assert tripwire == []


def test_names_that_are_allowed_run_nothing_either(file: Path) -> None:
    """Even a name on the list is only noted: here a class with an initializer that would fail."""
    file.write_bytes(zipped(b"\x80\x02cargparse\nNamespace\n(K\x01K\x02tR}X\x01\x00\x00\x00aK\x01sb."))
    root = open_torch_file(file).root
    assert (root.name, root.arguments, root.state) == ("argparse.Namespace", (1, 2), {"a": 1})
    file.write_bytes(zipped(b"\x80\x02cmegatron.model.enums\nModelType\nK\x01\x85R."))
    assert open_torch_file(file).root.name == "megatron.model.enums.ModelType"


@pytest.mark.parametrize(
    "program",
    [
        b"\x80\x02r\xff\xff\xff\xff.",  # a memo index of 2**32 - 1
        b"\x80\x02]r\xff\xff\xff\x7f.",
        b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"x.",  # BINUNICODE8 longer than the file
        b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b"x.",  # BINBYTES8
        b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"x.",  # LONG4
        b"\x80\x02\x8b" + struct.pack("<i", -5) + b"x.",
        b"\x80\x02X" + struct.pack("<I", 2**32 - 1) + b"x.",
        b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".",  # BYTEARRAY8
        b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"N.",  # FRAME
        b"\x80\x02" + b"2" * 100 + b".",  # DUP
        b"\x80\x02" + b"(" * 5_000 + b"t" * 5_000 + b".",  # deep nesting
        b"\x80\x02}" + b"(" * 5_000 + b"t" * 5_000 + b"Ns.",  # a deep dictionary key
        b"\x80\x02]K\x01\x94h\x00a.",
        b"\x80\x02}]K\x01s.",  # an unhashable key
        b"\x80\x02.",
        b"\x80\x02N",
        b"\x80\x09N.",
        b"\x80\x02(N.",
        b"\x80\x02Nb.",
        b"\x80\x02NNR.",
        b"\x80\x02h\x05.",
        b"\x80\x02Q.",
        b"\x80\x02X\x07\x00\x00\x00storageQ.",
        b"\x80\x02\x8c\x01\xff.",
        b"",
        b"\xff" * 100,
    ],
)
def test_broken_and_greedy_programs(file: Path, program: bytes) -> None:
    for layout in (zipped, legacy):
        file.write_bytes(layout(program))
        tracemalloc.start()
        try:
            content = open_torch_file(file)
            content.tensors(content.root)
        except CheckpointError as error:
            assert str(file) in str(error)
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        assert peak < 200e6


def test_endless_programs_are_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickles, "_MAX_STEPS", 1_000)
    file.write_bytes(zipped(b"\x80\x02" + b"]" * 1_100 + b"."))
    with pytest.raises(CheckpointError, match="more than 1000 operations"):
        open_torch_file(file)


def test_deep_values_do_not_crash(file: Path) -> None:
    for program in (b"(" * 100_000 + b"t" * 100_000 + b".", b"}" + b"(" * 60_000 + b"t" * 60_000 + b"Ns."):
        file.write_bytes(zipped(b"\x80\x02" + program))
        with contextlib.suppress(CheckpointError):
            open_torch_file(file)


def test_endless_trees_are_refused(file: Path) -> None:
    tree: dict[str, Any] = {"leaf": None}
    for _ in range(12):
        tree = {str(i): tree for i in range(20)}
    circle: dict[str, Any] = {}
    circle["again"] = circle
    for value in (tree, circle):
        file.write_bytes(zipped(pickle.dumps(value, 2)))
        content = open_torch_file(file)
        with pytest.raises(CheckpointError, match="no honest checkpoint"):
            content.tensors(content.root)


# -- honest and damaged files --------------------------------------------------------------------------------

STATE = {
    "a": torch.arange(6, dtype=torch.float32).view(2, 3),
    "b": torch.arange(4, dtype=torch.float64),
    "n": {"half": torch.ones(3, dtype=torch.bfloat16), "none": None},
}


def values(file: Path) -> dict[str, bytes]:
    content = open_torch_file(file)
    return {tensor.name: b"".join(map(bytes, tensor.chunks())) for tensor in content.tensors(content.root)}


EXPECTED = {
    "a": STATE["a"].numpy().tobytes(), "b": STATE["b"].numpy().tobytes(),
    "n.half": STATE["n"]["half"].view(torch.int16).numpy().tobytes(),
}  # fmt: skip


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_reads_what_torch_saves(file: Path, new: bool, protocol: int) -> None:
    torch.save(STATE, file, _use_new_zipfile_serialization=new, pickle_protocol=protocol)
    assert values(file) == EXPECTED


@pytest.mark.parametrize("new", [True, False])
def test_views_and_parameters(file: Path, new: bool) -> None:
    whole = torch.arange(12, dtype=torch.float32).view(4, 3)
    state = {"rows": whole[1:3], "parameter": torch.nn.Parameter(whole[3]), "columns": whole.t()}
    one = {"one": torch.as_strided(whole, (1, 3), (77, 1))}
    torch.save(one, file, _use_new_zipfile_serialization=new)
    assert values(file) == {"one": whole[0].numpy().tobytes()}
    torch.save(state, file, _use_new_zipfile_serialization=new)
    with pytest.raises(CheckpointError, match=r"columns: strides \(1, 3\) of \(3, 4\) are not row-major"):
        values(file)
    del state["columns"]
    torch.save(state, file, _use_new_zipfile_serialization=new)
    assert values(file) == {"rows": whole[1:3].numpy().tobytes(), "parameter": whole[3].numpy().tobytes()}


def test_a_file_inside_another(tmp_path: Path) -> None:
    stream = io.BytesIO()
    torch.save(STATE, stream)
    (tmp_path / "x").write_bytes(b"in front" + stream.getvalue() + b"behind")
    content = open_torch_file(tmp_path / "x", 8, len(stream.getvalue()))
    found = {tensor.name: b"".join(map(bytes, tensor.chunks())) for tensor in content.tensors(content.root)}
    assert found == EXPECTED


def test_damaged_numbers_are_found_by_the_archives_checksum(file: Path) -> None:
    torch.save(STATE, file)
    data = file.read_bytes().replace(EXPECTED["a"], EXPECTED["a"][:-1] + b"\x7f")
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="a is damaged: CRC-32"):
        values(file)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": 3}, "a: a tensor expected, int found"),
        (3, "a tensor expected, int found"),
    ],
)
def test_a_state_dict_holds_tensors(file: Path, content: Any, message: str) -> None:
    torch.save(content, file)
    with pytest.raises(CheckpointError, match=message):
        read_torch_file(file)


def test_other_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"x\.bin"):
        read_torch_file(tmp_path / "x.bin")
    for data in (
        b"",
        b"text",
        b"PK\x03\x04 but no archive",
        pickle.dumps({"a": 1}),
        zipped(b"N.").replace(b".pkl", b".pkx"),
    ):
        (tmp_path / "x.bin").write_bytes(data)
        with pytest.raises(CheckpointError, match=r"x\.bin"):
            read_torch_file(tmp_path / "x.bin")


def test_big_endian_and_compressed_files_are_refused(file: Path) -> None:
    file.write_bytes(zipped(b"\x80\x02}.", byteorder=b"big"))
    with pytest.raises(CheckpointError, match="little-endian"):
        open_torch_file(file)
    torch.save(STATE, file)
    with zipfile.ZipFile(file) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    with pytest.raises(CheckpointError, match="compressed"):
        open_torch_file(file)


@pytest.fixture(scope="module")
def victims(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """One honest file of each layout."""
    files = [tmp_path_factory.mktemp("victims") / name for name in ("new.pt", "old.pt")]
    for file in files:
        torch.save(STATE, file, _use_new_zipfile_serialization=file.stem == "new")
    return files


@settings(max_examples=300)
@given(st.data())
def test_damage_is_an_error_or_harmless(victims: list[Path], data: st.DataObject) -> None:
    """Truncated or with bytes changed anywhere: CheckpointError, or tensors that fit the file."""
    victim = data.draw(st.sampled_from(victims))
    whole = bytearray(victim.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    file = victim.with_suffix(".damaged")
    file.write_bytes(whole[: data.draw(st.integers(0, len(whole)))] if data.draw(st.booleans()) else whole)
    try:
        values(file)
    except CheckpointError as error:
        assert str(file) in str(error)
