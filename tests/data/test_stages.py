"""The same bytes from one file or many, here or elsewhere, after any interruption; and nothing dropped silently."""

from __future__ import annotations

import gzip
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pyarrow import parquet

from made_corpus import made_code, made_text
from persimmon.data import stages
from persimmon.data.packing import PackedRows
from persimmon.data.prepare import prepare
from persimmon.data.recipe import DataRecipe, ExecutorRecipe, SourceRecipe, VocabularyRecipe
from persimmon.data.tokens import TokenStore, check_vocabulary, read_manifest
from persimmon.errors import ConfigError, DataError, UnavailableError
from persimmon.tokenizer import Tokenizer
from persimmon.train.recipe import from_mapping, load_recipe

ROOT = Path(__file__).parents[2]


def write_lines(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def noisy(text: str, seed: int) -> str:
    """A near copy: one word more."""
    words = text.split(" ")
    return " ".join([*words[: len(words) // 2], f"word{seed}", *words[len(words) // 2 :]])


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five files of text with equal, similar, empty and leaked documents, two of code; and an evaluation set."""
    root = tmp_path_factory.mktemp("corpus")
    question = made_text(900, 5).replace("\n", " ")
    for number in range(5):
        texts = [made_text(10 * number + i, 40 + i) for i in range(8)]
        write_lines(root / f"text{number}.jsonl", [*texts, texts[0], noisy(texts[1], number), ""])
    write_lines(
        root / "text5.jsonl",
        [f"As they ask: {question} And more. " + made_text(901, 12), made_text(1, 41), made_text(77, 4)],
    )
    for number in range(2):
        write_lines(root / f"code{number}.jsonl", [made_code(100 * number + i, 5 + i) for i in range(12)])
    (root / "eval").mkdir()
    write_lines_of = [{"id": "q1", "query": question, "choices": ["a", "b"], "gold": 0}]
    (root / "eval/arc_easy.jsonl").write_text("".join(json.dumps(record) + "\n" for record in write_lines_of))
    return root


def recipe(root: Path, output: Path, **changes: Any) -> DataRecipe:
    settings: dict[str, Any] = {
        "root": str(root),
        "output": str(output),
        "sources": {"text": {"files": ["text*.jsonl"]}, "code": {"files": ["code*.jsonl"]}},
        "vocabulary": {"size": 320, "characters": 60_000},
        "held_out": 0.1,
        "deduplicate": {"minhash": True},
        "decontaminate": {"directory": str(root / "eval"), "words": 8},
        "filters": {"min_characters": 300},
        "part_bytes": 1,
    }
    return from_mapping(DataRecipe, {**settings, **changes}, "test")


@pytest.fixture(scope="module")
def prepared(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("prepared")
    prepare(recipe(root, output))
    return output


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir()) if path.is_file()}


def dropped(directory: Path, name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in gzip.open(directory / f"dropped.{name}.jsonl.gz", "rt")]


def test_every_drop_is_counted_and_named(prepared: Path) -> None:
    facts = read_manifest(prepared)["sources"]["text"]
    records = dropped(prepared, "text")
    assert facts["read"]["documents"] == 5 * 11 + 3
    assert facts["dropped"] == {"duplicate": 6, "empty": 5, "evaluation": 1, "min_characters": 1, "similar": 5}
    assert facts["documents"] + facts["held_out"] + len(records) == facts["read"]["documents"]
    by_reason = {reason: [r for r in records if r["reason"] == reason] for reason in facts["dropped"]}
    assert {reason: len(found) for reason, found in by_reason.items()} == facts["dropped"]
    (leak,) = by_reason["evaluation"]
    assert leak["origin"] == "text5.jsonl:1" and leak["question"] == "q1" and len(leak["words"].split()) == 8
    assert {"origin": "text5.jsonl:2", "reason": "duplicate", "of": "text0.jsonl:2"} in records
    assert {"origin": "text3.jsonl:9", "reason": "duplicate", "of": "text3.jsonl:1"} in records
    assert {"origin": "text2.jsonl:10", "reason": "similar", "of": "text2.jsonl:2"} in records
    assert [r["origin"] for r in by_reason["empty"]] == [f"text{i}.jsonl:11" for i in range(5)]


def test_parts_and_shards_change_nothing_but_files(root: Path, prepared: Path, tmp_path: Path) -> None:
    """One part with one shard, one part a file, and tiny shards give the same rows and reports."""
    prepare(recipe(root, tmp_path / "one", part_bytes=10**9))
    prepare(recipe(root, tmp_path / "tiny", shard_tokens=2000))
    one, tiny = read_manifest(tmp_path / "one")["sources"], read_manifest(tmp_path / "tiny")["sources"]
    assert len(one["text"]["shards"]) == 1 and len(tiny["text"]["shards"]) > 8
    assert max(shard["tokens"] for shard in tiny["text"]["shards"] if shard["documents"] > 1) <= 2000
    assert len(tiny["text"]["shards"]) > len(read_manifest(prepared)["sources"]["text"]["shards"])
    rows = []
    for directory in (prepared, tmp_path / "one", tmp_path / "tiny"):
        stores = {name: TokenStore(directory, name) for name in ("text", "code")}
        for store in stores.values():
            store.verify()
        rows.append(PackedRows(stores, {"text": 0.75, "code": 0.25}, 96, 5))
        assert dropped(directory, "text") is not None
        assert sorted(map(str, dropped(directory, "text"))) == sorted(map(str, dropped(prepared, "text")))
    for number in range(150):  # several epochs
        first = rows[0][number]
        for other in (rows[1][number], rows[2][number]):
            assert np.array_equal(first.token_ids, other.token_ids) and np.array_equal(first.targets, other.targets)
            assert (first.boundaries, first.source) == (other.boundaries, other.source)


def test_datatrove_on_this_machine_gives_the_same_bytes(root: Path, prepared: Path, tmp_path: Path) -> None:
    prepare(recipe(root, tmp_path, executor={"kind": "local", "workers": 2}))
    assert contents(tmp_path) == contents(prepared)


SBATCH = """#!{python}
import os, re, subprocess, sys
script = open(sys.argv[-1]).read()
first, last = map(int, re.search(r"--array=(\\d+)-(\\d+)", script).groups()) if "--array" in script else (0, 0)
export = [word for word in sys.argv if word.startswith("--export=ALL,")]
extra = dict(word.split("=") for one in export for word in one.removeprefix("--export=ALL,").split(","))
for task in range(first, last + 1):
    environment = os.environ | extra | {{"SLURM_ARRAY_TASK_ID": str(task), "SLURM_NODELIST": "node1"}}
    subprocess.run(["bash", sys.argv[-1]], env=environment, check="merge_stats" not in script, stdout=sys.stderr)
with open({log!r}, "a") as log:
    print(*(word for word in sys.argv if "dependency" in word), file=log)
print("Submitted batch job", 7 + open({log!r}).read().count("\\n"))
"""


def test_datatrove_on_slurm_gives_the_same_bytes(
    root: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an `sbatch` that runs every script at once: job arrays, pickles and launch scripts are datatrove's own."""
    programs = tmp_path / "bin"
    programs.mkdir()
    launch = f'#!/bin/sh\nexec {sys.executable} -m datatrove.tools.launch_pickled_pipeline "$@"\n'
    sbatch = SBATCH.format(python=sys.executable, log=str(tmp_path / "submitted"))
    nodes = "#!/bin/sh\necho node1\n"
    texts = {"sbatch": sbatch, "launch_pickled_pipeline": launch, "scontrol": nodes, "merge_stats": "#!/bin/sh\n"}
    for name, text in texts.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    options = {"partition": "cpu", "time": "01:00:00", "with_srun": False, "tasks_per_job": 20}
    output = tmp_path / "out"
    lines: list[str] = []
    executor = {"kind": "slurm", "workers": 4, "options": options}
    assert prepare(recipe(root, output, executor=executor), lines.append) is None
    assert lines[-1].startswith("submitted; ")
    assert contents(output) == contents(prepared)
    assert "afterok" in (tmp_path / "submitted").read_text()


class Crash(Exception):
    pass


@pytest.mark.parametrize("every", [1, 7])
def test_a_run_killed_at_any_file_goes_on(
    root: Path, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    """Stopped before each `every`-th rename in turn and started again: the same bytes, and no data before the end."""
    vocabulary = {"path": str(prepared / "tokenizer.model")}
    prepare(recipe(root, tmp_path / "whole", vocabulary=vocabulary))
    rename, allowed = os.replace, every

    def failing(source: Any, target: Any) -> None:
        nonlocal allowed
        if not allowed:
            raise Crash
        allowed -= 1
        rename(source, target)

    monkeypatch.setattr(os, "replace", failing)
    output, crashes = tmp_path / "killed", 0
    while True:
        try:
            prepare(recipe(root, output, vocabulary=vocabulary))
            break
        except Crash:
            # The manifest comes last: where it is, everything is.
            assert not (output / "manifest.json").exists() or contents(output) == contents(tmp_path / "whole")
            # The task with the most files, the choice, needs 17 renames to get through.
            crashes, allowed = crashes + 1, max(every, 20)
    assert crashes >= 5
    assert contents(output) == contents(tmp_path / "whole")


def test_done_tasks_are_not_done_again(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise Crash

    monkeypatch.setattr(stages, "train_vocabulary", stop)
    with pytest.raises(Crash):
        prepare(recipe(root, tmp_path))
    monkeypatch.undo()
    monkeypatch.setattr(stages, "read_records", stop)
    prepare(recipe(root, tmp_path))
    assert not (tmp_path / ".work").exists()


BAD = [
    (b'{"text": \n', "broken", r"text9\.jsonl:2: not JSON"),
    (b'{"text": 7}\n', "broken", r"text9\.jsonl:2: `text` must be a string, got int"),
    (b'{"text": "\xe9"}\n', "broken", r"text9\.jsonl:2: not UTF-8"),
    (b'{"body": "x"}\n', "broken", r"text9\.jsonl:2: `text` must be a string, got NoneType"),
    (b'{"text": ""}\n', "empty", r"text9\.jsonl:2: the document is empty"),
]


@pytest.mark.parametrize(("line", "reason", "message"), BAD)
def test_bad_records_stop_or_are_skipped_and_counted(tmp_path: Path, line: bytes, reason: str, message: str) -> None:
    good = [json.dumps({"text": made_text(i, 30)}).encode() + b"\n" for i in range(9)]
    (tmp_path / "text9.jsonl").write_bytes(good[0] + line + b"".join(good[1:]))
    settings: dict[str, Any] = {"sources": {"text": {"files": ["text9.jsonl"]}}, "decontaminate": None}
    settings["vocabulary"] = {"size": 300}
    with pytest.raises(DataError, match=message):
        prepare(recipe(tmp_path, tmp_path / "a", on_error="stop", on_empty="stop", **settings))
    assert not (tmp_path / "a/manifest.json").exists()
    prepare(recipe(tmp_path, tmp_path / "b", on_error="skip", **settings))
    facts = read_manifest(tmp_path / "b")["sources"]["text"]
    assert facts["dropped"] == {reason: 1}
    assert facts["documents"] + facts["held_out"] == 9
    (record,) = dropped(tmp_path / "b", "text")
    assert record["origin"] == "text9.jsonl:2" and record["reason"] == reason


def test_a_truncated_file_costs_its_rest_only(tmp_path: Path) -> None:
    lines = b"".join(json.dumps({"text": made_text(i, 60)}).encode() + b"\n" for i in range(300))
    whole = gzip.compress(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) * 2 // 3])
    write_lines(tmp_path / "b.jsonl", [made_text(1000 + i, 30) for i in range(9)])
    settings: dict[str, Any] = {"sources": {"text": {"files": ["*.jsonl*"]}}, "decontaminate": None, "on_error": "skip"}
    settings["vocabulary"] = {"size": 300}
    prepare(recipe(tmp_path, tmp_path / "out", **settings))
    facts = read_manifest(tmp_path / "out")["sources"]["text"]
    assert facts["dropped"]["broken"] == 1 and 100 < facts["documents"] < 309
    (record,) = [r for r in dropped(tmp_path / "out", "text") if r["reason"] == "broken"]
    assert record["origin"] == "a.jsonl.gz" and "damaged file after line" in record["error"]


def test_duplicates_within_sources_or_across(tmp_path: Path) -> None:
    shared = made_text(3, 30)
    write_lines(tmp_path / "a.jsonl", [shared, *(made_text(10 + i, 30) for i in range(9))])
    write_lines(tmp_path / "b.jsonl", [shared, *(made_code(10 + i, 30) for i in range(9))])
    sources = {"text": {"files": ["a.jsonl"]}, "code": {"files": ["b.jsonl"]}}
    for across, expected in ((False, {}), (True, {"duplicate": 1})):
        settings = {"sources": sources, "decontaminate": None, "deduplicate": {"across": across}}
        prepare(recipe(tmp_path, tmp_path / f"out-{across}", **settings))
        assert read_manifest(tmp_path / f"out-{across}")["sources"]["code"]["dropped"] == expected
    (record,) = dropped(tmp_path / "out-True", "code")
    assert record == {"origin": "b.jsonl:1", "reason": "duplicate", "of": "a.jsonl:1"}


def test_default_weights_are_the_release_mix() -> None:
    def weights(**given: float | None) -> dict[str, float]:
        return DataRecipe("r", "o", {name: SourceRecipe(("x",), weight) for name, weight in given.items()}).weights

    assert weights(code=None, text=None) == {"code": 0.25, "text": 0.75}
    assert weights(books=None) == {"books": 1.0}
    assert weights(text=3.0, code=1.0) == {"text": 3.0, "code": 1.0}
    with pytest.raises(ConfigError, match="sources without a weight: code"):
        weights(text=1.0, code=None)
    with pytest.raises(ConfigError, match="sources without a weight: books, text"):
        weights(text=None, books=None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"on_error": "ignore"}, "on_error must be stop or skip, got 'ignore'"),
        ({"on_empty": "x"}, "on_empty must be stop or skip"),
        ({"shard_tokens": 0}, "shard_tokens must be at least 1"),
        ({"deduplicate": {"bands": 0}}, "bands must be at least 1, got 0"),
        ({"decontaminate": {"directory": "x", "words": 2}}, "words must be at least 3"),
        ({"executor": {"kind": "cloud"}}, "kind must be one of in_process, local, slurm, ray, got 'cloud'"),
        ({"executor": {"options": {"a": 1}}}, "in_process has none"),
        ({"executor": {"workers": 0}}, "workers must be at least 1"),
        ({"filters": {"max_length": 3}}, "filters: unknown key 'max_length'"),
        ({"sources": {"text": {"files": []}}}, "files must name at least one pattern"),
        ({"sources": {"text": {"files": ["x"], "weight": float("inf")}}}, "weight must be positive, got inf"),
        ({"sources": {"text": {"files": ["x"], "weight": "much"}}}, "expected float, got 'much'"),
    ],
)
def test_recipes_that_cannot_be(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe(tmp_path, tmp_path, **changes)


def test_unknown_executor_options_are_named(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"executor\.options: .*'partitions'"):
        prepare(recipe(root, tmp_path, executor={"kind": "local", "options": {"partitions": "x"}}))


def test_datatrove_on_ray_gives_the_same_bytes(root: Path, prepared: Path, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray", reason="needs the extra packages of persimmon[ray]")
    prepare(recipe(root, tmp_path, executor={"kind": "ray", "workers": 2}))
    assert contents(tmp_path) == contents(prepared) and not ray.is_initialized()


def test_a_task_that_fails_on_ray_ends_the_run(root: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="needs the extra packages of persimmon[ray]")
    large = {"size": 100_000, "characters": 60_000}
    with pytest.raises(DataError, match=r"stage learn: 1 of 1 tasks failed; why is at the end of (.*)") as caught:
        prepare(recipe(root, tmp_path, executor={"kind": "ray"}, vocabulary=large, part_bytes=10**9))
    log = Path(str(caught.value).rpartition("end of ")[2])
    assert "cannot train a vocabulary of 100000 pieces" in log.read_text()


def test_ray_is_an_extra(root: Path, tmp_path: Path) -> None:
    if "ray" in sys.modules or __import__("importlib.util").util.find_spec("ray"):
        pytest.skip("ray is installed")
    with pytest.raises(UnavailableError, match="executor ray needs the package ray"):
        prepare(recipe(root, tmp_path, executor={"kind": "ray"}))


def test_another_vocabulary_is_refused(prepared: Path, tmp_path: Path) -> None:
    check_vocabulary(prepared, Tokenizer.load(prepared).serialized)
    with pytest.raises(DataError, match="was tokenized with another vocabulary"):
        check_vocabulary(prepared, b"another")


def test_the_large_recipe_of_the_repository_can_be_read() -> None:
    large = load_recipe(DataRecipe, ROOT / "configs/large-data.yaml")
    assert large.executor.kind == "slurm" and large.weights == {"text": 0.75, "code": 0.25}
    assert ExecutorRecipe().kind == "in_process" and VocabularyRecipe().size == 8192


def test_the_large_recipe_runs_small(root: Path, tmp_path: Path) -> None:
    """On made files in its folders, in this process; nothing else of it is changed."""
    for name, field in (("text", "text"), ("code", "content")):
        (tmp_path / name).mkdir()
        make = made_text if name == "text" else made_code
        lines = "\n".join(json.dumps({field: make(i, 40)}) for i in range(20)).encode()
        (tmp_path / name / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    import pyarrow

    content = gzip.decompress((tmp_path / "text/a.jsonl.gz").read_bytes())
    (tmp_path / "text/a.jsonl.zst").write_bytes(pyarrow.compress(content, codec="zstd", asbytes=True))
    parquet.write_table(
        pyarrow.table({"text": [made_text(200 + i, 40) for i in range(9)]}), tmp_path / "text/b.parquet"
    )
    overrides = [
        f"root={tmp_path}", f"output={tmp_path}/out", "vocabulary.size=330", "executor.kind=in_process",
        "executor.options={}", f"decontaminate.directory={root}/eval", "filters.max_compression=30.0",
    ]  # fmt: skip
    prepare(load_recipe(DataRecipe, ROOT / "configs/large-data.yaml", overrides))
    facts = read_manifest(tmp_path / "out")["sources"]
    assert facts["text"]["documents"] + facts["text"]["held_out"] == 29
