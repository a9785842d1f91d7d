"""`persimmon data prepare`: documents to a vocabulary, token stores, held-out documents and their manifest."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from persimmon.atomic import replacing, write_text
from persimmon.data.executors import execute
from persimmon.data.files import CorpusFile, find_corpus_files
from persimmon.data.recipe import DataRecipe, SourceRecipe, VocabularyRecipe, is_held_out
from persimmon.data.stages import STAGES, Job, Part, Stage, result, token_dtype
from persimmon.data.tokens import TokenStore, read_manifest
from persimmon.errors import PersimmonError

__all__ = ["DataRecipe", "SourceRecipe", "VocabularyRecipe", "is_held_out", "prepare"]

_LAYOUT = 2
"""Raised when the same recipe and files would give other bytes."""


def prepare(recipe: DataRecipe, report: Callable[[str], None] = lambda line: None) -> dict[str, Any] | None:
    """Run the recipe; returns the manifest it wrote, or None where the work was handed to a queue.

    An interrupted run goes on where it was; a finished one is recognised. `report` gets one line per finished part.
    """
    output = Path(recipe.output)
    job = plan_job(recipe)
    if (finished := _finished(output, _fingerprint_of(job))) is not None:
        report(f"{output} holds this recipe's data already")
        shutil.rmtree(job.work.parent, ignore_errors=True)
        return finished
    if not execute(job, ALL_STAGES, lambda stage, done: _report(job, stage, done, report)):
        report(f"submitted; `persimmon data inspect {output}` shows the result when the last job is done")
        return None
    shutil.rmtree(job.work.parent, ignore_errors=True)
    return read_manifest(output)


def plan_job(recipe: DataRecipe) -> Job:
    """The parts of a recipe and its directory for what is not finished, which holds nothing of other recipes."""
    files = {name: find_corpus_files(Path(recipe.root), source.files) for name, source in recipe.sources.items()}
    output = Path(recipe.output).resolve()
    work = output / ".work" / _fingerprint(recipe, files)[:16]
    for other in work.parent.glob("*"):
        if other != work:  # of another recipe or of other files
            shutil.rmtree(other)
    work.mkdir(parents=True, exist_ok=True)
    return Job(dataclasses.replace(recipe, output=str(output)), _plan(recipe, files), work)


def _fingerprint(recipe: DataRecipe, files: dict[str, list[CorpusFile]]) -> str:
    """Of everything that decides about the result, wherever the files lie and whoever does the work."""
    settings = dataclasses.asdict(recipe)
    for name in ("root", "output", "executor"):
        del settings[name]
    places = []
    if recipe.vocabulary.path is not None:
        path = Path(recipe.vocabulary.path)
        places += [path / "tokenizer.model" if path.is_dir() else path]
        settings["vocabulary"] = None
    if recipe.decontaminate is not None:
        places += sorted(Path(recipe.decontaminate.directory).glob("*.jsonl*"))
        settings["decontaminate"]["directory"] = None
    prints = {name: [file.fingerprint() for file in found] for name, found in files.items()}
    extra = [CorpusFile(place.name, str(place)).fingerprint() for place in places if place.is_file()]
    return hashlib.sha256(json.dumps([_LAYOUT, settings, prints, extra], sort_keys=True).encode()).hexdigest()


def _finished(output: Path, fingerprint: str) -> dict[str, Any] | None:
    """The manifest at `output` if it is of this recipe and its stores can be opened."""
    try:
        manifest = read_manifest(output)
        if manifest.get("fingerprint") != fingerprint:
            return None
        for name in manifest["sources"]:
            TokenStore(output, name)
    except PersimmonError:
        return None
    return manifest


def _plan(recipe: DataRecipe, files: dict[str, list[CorpusFile]]) -> tuple[Part, ...]:
    """Consecutive files of a source as one part, up to `part_bytes`."""
    parts: list[Part] = []
    for name, found in files.items():
        groups: list[list[CorpusFile]] = [[]]
        size = 0
        for file in found:
            if groups[-1] and size + file.size > recipe.part_bytes:
                groups.append([])
                size = 0
            groups[-1].append(file)
            size += file.size
        parts += [Part(name, number, tuple(group)) for number, group in enumerate(groups)]
    return tuple(parts)


def _finish(job: Job, _: int) -> dict[str, Any]:
    """Put shards, vocabulary and reports in place, the manifest last."""
    output, old = Path(job.recipe.output), _files_of(Path(job.recipe.output))
    vocabulary = result(job, "learn", 0)
    sources = {name: _source_facts(job, name) for name in job.recipe.sources}
    (output / "manifest.json").unlink(missing_ok=True)  # from here on until the end there is no data here
    for facts in sources.values():
        for shard in facts["shards"]:
            for ending in (".bin", ".idx"):
                _move(job.work / "tokenize" / f"{shard['file']}{ending}", output / f"{shard['file']}{ending}")
    _move(job.work / "learn" / "tokenizer.model", output / "tokenizer.model")
    for name in job.recipe.sources:
        _concatenate(job, name, ("tokenize",), "held_out")
        _concatenate(job, name, ("read", "tokenize"), "dropped")
    manifest = {
        "dtype": token_dtype(vocabulary["vocab_size"]),
        "vocab_size": vocabulary["vocab_size"],
        "tokenizer_sha256": vocabulary["sha256"],
        "fingerprint": _fingerprint_of(job),
        "sources": sources,
    }
    for leftover in old - _files_named(sources):
        (output / leftover).unlink(missing_ok=True)
    write_text(output / "manifest.json", json.dumps(manifest, indent=2))
    return {}


def _fingerprint_of(job: Job) -> str:
    files = {name: [f for part in job.parts if part.source == name for f in part.files] for name in job.recipe.sources}
    return _fingerprint(job.recipe, files)


def _source_facts(job: Job, name: str) -> dict[str, Any]:
    """The entry of one source in the manifest."""
    numbers = [number for number, part in enumerate(job.parts) if part.source == name]
    tokens = [result(job, "tokenize", number) for number in numbers]
    reads = [result(job, "read", number) for number in numbers]
    return {
        **{key: sum(entry[key] for entry in tokens) for key in ("documents", "characters", "tokens", "bytes")},
        "weight": job.recipe.weights[name],
        "read": {key: sum(entry["read"].get(key, 0) for entry in reads) for key in ("documents", "characters")},
        "held_out": result(job, "choose", 0)[name]["held_out"],
        "dropped": _source_drops(job, name),
        "shards": [shard for entry in tokens for shard in entry["shards"] if shard["tokens"] or len(tokens) == 1],
    }


def _files_of(output: Path) -> set[str]:
    """Shards and reports of the data that is at `output`."""
    try:
        return _files_named(read_manifest(output)["sources"])
    except PersimmonError:
        return set()


def _files_named(sources: dict[str, Any]) -> set[str]:
    names = set()
    for name, facts in sources.items():
        names |= {f"held_out.{name}.jsonl.gz", f"dropped.{name}.jsonl.gz"}
        files = [shard["file"] for shard in facts["shards"]] if "shards" in facts else [name]
        names |= {f"{file}{ending}" for file in files for ending in (".bin", ".idx")}
    return names


def _move(source: Path, target: Path) -> None:
    """Once: a run that was killed while moving finds some files in their place already."""
    if source.is_file():
        os.replace(source, target)


def _concatenate(job: Job, name: str, stages: tuple[str, ...], kind: str) -> None:
    """One file of all parts: gzip files laid end to end are a gzip file."""
    target = Path(job.recipe.output) / f"{kind}.{name}.jsonl.gz"
    with replacing(target) as partial, partial.open("wb") as stream:
        for stage in stages:
            for part in job.parts:
                if part.source == name:
                    with (job.work / stage / f"{part.name}.{kind}.gz").open("rb") as piece:
                        shutil.copyfileobj(piece, stream)


ALL_STAGES = (*STAGES, Stage("finish", lambda job: 1, _finish))


def _report(job: Job, stage: str, done: bool, report: Callable[[str], None]) -> None:
    if stage == "choose" and done:
        for name, counts in result(job, "choose", 0).items():
            report(f"{name}: {counts['kept']:,} documents for training, {counts['held_out']:,} held out")
            dropped = _source_drops(job, name)
            if dropped:
                report(f"{name}: dropped " + ", ".join(f"{count:,} {reason}" for reason, count in dropped.items()))
    elif stage == "learn" and done:
        report(f"vocabulary: {result(job, 'learn', 0)['vocab_size']:,} pieces")
    elif stage == "finish" and done:
        for name, facts in read_manifest(Path(job.recipe.output))["sources"].items():
            report(f"{name}: {facts['tokens']:,} tokens, {facts['bytes'] / facts['tokens']:.2f} bytes each")


def _source_drops(job: Job, name: str) -> dict[str, int]:
    drops: Counter[str] = Counter()
    for number, part in enumerate(job.parts):
        if part.source == name:
            drops.update(result(job, "read", number)["drops"])
    chosen = result(job, "choose", 0)[name]
    drops.update({reason: chosen[reason] for reason in ("duplicate", "similar") if chosen[reason]})
    return dict(sorted(drops.items()))
