"""The work of `data prepare` in stages of independent tasks: the same functions in this process and on a cluster.

| stage | one task per | reads -> writes (in the work directory) |
|---|---|---|
| read | part | files -> documents that pass filters and decontamination, their hashes, what was dropped |
| match | band | hashes of one MinHash band -> pairs of similar documents |
| choose | run | hashes and pairs -> which documents stay, and which are held out |
| learn | run | a sample of the documents that stay -> the vocabulary |
| tokenize | part | documents that stay -> token shards, held-out documents |

A part is a run of files of one source. Which files form a part follows from the recipe and the files' sizes alone, so
the result does not depend on who works on it. A task writes aside and renames, its `.json` last: a task whose `.json`
is there is done, whatever happened to the others.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from persimmon.atomic import replacing, write_bytes
from persimmon.data import duplicates
from persimmon.data.decontaminate import EvaluationIndex
from persimmon.data.documents import Document, read_json_lines, read_records
from persimmon.data.files import CorpusFile
from persimmon.data.recipe import DataRecipe
from persimmon.data.tokens import TokenStoreWriter
from persimmon.data.vocabulary import sample_texts, train_vocabulary
from persimmon.errors import DataError
from persimmon.tokenizer import Tokenizer

KEPT, DUPLICATE, SIMILAR, HELD_OUT = range(4)
"""What becomes of a document that was read."""

_LEVEL = 1  # of gzip for files that live as long as the work


@dataclass(frozen=True)
class Part:
    """Files of one source that one task works on."""

    source: str
    number: int
    files: tuple[CorpusFile, ...]

    @property
    def name(self) -> str:
        """Prefix of its files."""
        return f"{self.source}-{self.number:05d}"


@dataclass(frozen=True)
class Job:
    """A recipe with its parts and the directory for what is not finished."""

    recipe: DataRecipe
    parts: tuple[Part, ...]
    work: Path


@dataclass(frozen=True)
class Stage:
    """A step of the work: how many tasks it has and what each does; the result of a task is JSON."""

    name: str
    tasks: Callable[[Job], int]
    work: Callable[[Job, int], dict[str, Any]]


def run_task(job: Job, stage: Stage, number: int) -> None:
    """Do one task unless it is done."""
    file = result_file(job, stage.name, number)
    if file.is_file():
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(file, json.dumps(stage.work(job, number)).encode())


def result_file(job: Job, stage: str, number: int) -> Path:
    """Where the result of a task is, once it is done."""
    return job.work / stage / f"{number:05d}.json"


def result(job: Job, stage: str, number: int) -> dict[str, Any]:
    """The result of a task that is done."""
    document: dict[str, Any] = json.loads(result_file(job, stage, number).read_bytes())
    return document


class _Lines:
    """Writes JSON lines into a gzip file."""

    def __init__(self, stream: gzip.GzipFile) -> None:
        self._stream = stream

    def write(self, record: dict[str, Any]) -> None:
        self._stream.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")


@contextmanager
def _lines(path: Path) -> Iterator[_Lines]:
    """A gzip file of JSON lines, which is there once the block has ended without an error."""
    with (
        replacing(path) as partial,
        partial.open("wb") as file,
        gzip.GzipFile("", "wb", _LEVEL, file, mtime=0) as stream,
    ):
        yield _Lines(stream)


@lru_cache(maxsize=1)
def _evaluation_index(directory: str, words: int) -> EvaluationIndex:
    return EvaluationIndex(Path(directory), words)


class _Reader:
    """Reads one part; counts and names what it leaves out."""

    def __init__(self, job: Job, part: Part, dropped: _Lines) -> None:
        recipe = job.recipe
        self._recipe, self._part, self._dropped = recipe, part, dropped
        self._source = recipe.sources[part.source]
        self._filters = self._source.filters or recipe.filters
        decontaminate = recipe.decontaminate
        self._index = _evaluation_index(decontaminate.directory, decontaminate.words) if decontaminate else None
        self.counts: Counter[str] = Counter()
        self.drops: Counter[str] = Counter()

    def documents(self) -> Iterator[Document]:
        """The documents that stay."""
        for file in self._part.files:
            for document in read_records(file, self._source.field, self._on_bad):
                self.counts["documents"] += 1
                self.counts["characters"] += len(document.text)
                reason, details = self._refusal(document)
                if reason is None:
                    yield document
                else:
                    self._drop(reason, document.origin, **details)

    def _on_bad(self, error: DataError) -> None:
        if self._recipe.on_error == "stop":
            raise error
        self._drop("broken", str(error).split(": ")[0], error=str(error))

    def _refusal(self, document: Document) -> tuple[str | None, dict[str, str]]:
        if not document.text:
            if self._recipe.on_empty == "stop":
                raise DataError(f"{document.origin}: the document is empty")
            return "empty", {}
        if reason := self._filters.refusal(document.text):
            return reason, {}
        if self._index and (overlap := self._index.overlap(document.text)):
            return "evaluation", {"question": overlap.question, "words": overlap.words}
        return None, {}

    def _drop(self, reason: str, origin: str, **details: str) -> None:
        self.drops[reason] += 1
        self._dropped.write({"origin": origin, "reason": reason, **details})


def _read(job: Job, number: int) -> dict[str, Any]:
    part, recipe, folder = job.parts[number], job.recipe, job.work / "read"
    settings, digests, bands, origins = recipe.deduplicate, [], [], []
    with _lines(folder / f"{part.name}.documents.gz") as kept, _lines(folder / f"{part.name}.dropped.gz") as dropped:
        reader = _Reader(job, part, dropped)
        for document in reader.documents():
            digest = hashlib.sha256(document.text.encode()).digest()
            digests.append(digest)
            origins.append(document.origin)
            if settings.minhash:
                shape = {"shingle": settings.shingle, "bands": settings.bands, "rows": settings.rows}
                bands.append(duplicates.band_hashes(document.text, digest, **shape))
            kept.write({"text": document.text, "origin": document.origin})
    _save(folder / f"{part.name}.digests.npy", np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, 32))
    if settings.minhash:  # a row per band: the task of a band reads its own alone
        table = np.array(bands, dtype=np.uint64).reshape(-1, settings.bands).T
        _save(folder / f"{part.name}.bands.npy", np.ascontiguousarray(table))
    write_bytes(folder / f"{part.name}.origins.json", json.dumps(origins).encode())
    return {"kept": len(digests), "read": dict(reader.counts), "drops": dict(reader.drops)}


def _save(path: Path, values: Any) -> None:
    with replacing(path) as partial, partial.open("wb") as stream:
        np.save(stream, values)


def _groups(job: Job) -> list[list[Part]]:
    """Parts among which duplicates are sought."""
    if job.recipe.deduplicate.across:
        return [list(job.parts)]
    return [[part for part in job.parts if part.source == name] for name in job.recipe.sources]


def _match(job: Job, band: int) -> dict[str, Any]:
    for number, group in enumerate(_groups(job)):
        tables = [np.load(job.work / "read" / f"{part.name}.bands.npy", mmap_mode="r")[band] for part in group]
        _save(job.work / "match" / f"{number}-{band:03d}.npy", duplicates.pairs_of_band(np.concatenate(tables)))
    return {}


def _choose(job: Job, _: int) -> dict[str, Any]:
    drops: dict[str, Counter[str]] = {name: Counter() for name in job.recipe.sources}
    for number, group in enumerate(_groups(job)):
        digests = [np.load(job.work / "read" / f"{part.name}.digests.npy") for part in group]
        starts = np.cumsum([0, *map(len, digests)])
        first = duplicates.first_occurrences(np.concatenate(digests))
        similar = first
        if job.recipe.deduplicate.minhash:
            pairs = [np.load(file) for file in sorted((job.work / "match").glob(f"{number}-*.npy"))]
            similar = duplicates.join(len(first), pairs)
        codes = np.where(first < np.arange(len(first)), DUPLICATE, KEPT)
        codes[(codes == KEPT) & (similar < np.arange(len(first)))] = SIMILAR
        names = _origins(job, group, starts, np.where(codes == DUPLICATE, first, similar)[codes != KEPT])
        for part, start, end, own in zip(group, starts, starts[1:], digests, strict=False):
            mine = codes[start:end]
            held = own[:, :8].copy().view(">u8").ravel() < np.uint64(int(job.recipe.held_out * 2**64))
            mine[(mine == KEPT) & held] = HELD_OUT
            of = [
                names[int(first[place] if codes[place] == DUPLICATE else similar[place])]
                for place in range(start, end)
                if codes[place] in (DUPLICATE, SIMILAR)
            ]
            _save(job.work / "choose" / f"{part.name}.npy", mine.astype(np.uint8))
            write_bytes(job.work / "choose" / f"{part.name}.of.json", json.dumps(of).encode())
            drops[part.source]["duplicate"] += int((mine == DUPLICATE).sum())
            drops[part.source]["similar"] += int((mine == SIMILAR).sum())
            drops[part.source]["kept"] += int((mine == KEPT).sum())
            drops[part.source]["held_out"] += int((mine == HELD_OUT).sum())
    for name, counts in drops.items():
        if not counts["kept"]:
            raise DataError(f"source {name!r} has no documents for training ({counts['held_out']} held out)")
    return {name: dict(counts) for name, counts in drops.items()}


def _origins(job: Job, group: list[Part], starts: Any, needed: Any) -> dict[int, str]:
    """Origins of some documents, by their numbers in the group."""
    wanted = np.unique(needed)
    names: dict[int, str] = {}
    for part, start, end in zip(group, starts, starts[1:], strict=False):
        mine = wanted[(wanted >= start) & (wanted < end)].tolist()
        if mine:
            origins = json.loads((job.work / "read" / f"{part.name}.origins.json").read_bytes())
            names |= {place: origins[place - int(start)] for place in mine}
    return names


def _chosen(job: Job, part: Part) -> Iterator[tuple[int, Document]]:
    """(what becomes of it, document) of every document that was read."""
    codes = np.load(job.work / "choose" / f"{part.name}.npy")
    file = job.work / "read" / f"{part.name}.documents.gz"
    records = read_json_lines(CorpusFile(file.name, str(file)))
    for code, (_, record) in zip(codes.tolist(), records, strict=True):
        yield code, Document(record["text"], record["origin"])


def kept_texts(job: Job, source: str, wanted: int = KEPT) -> Iterator[str]:
    """The training documents of one source, in order (or those of which something else became)."""
    for part in job.parts:
        if part.source == source:
            yield from (document.text for code, document in _chosen(job, part) if code == wanted)


def _learn(job: Job, _: int) -> dict[str, Any]:
    recipe = job.recipe
    if recipe.vocabulary.path is not None:
        tokenizer = Tokenizer.load(recipe.vocabulary.path)
    else:
        total = sum(recipe.weights.values())
        sample = sample_texts(
            {name: partial(kept_texts, job, name) for name in recipe.sources},
            {name: weight / total for name, weight in recipe.weights.items()},
            recipe.vocabulary.characters,
            recipe.seed,
        )
        tokenizer = Tokenizer(train_vocabulary(list(chain.from_iterable(sample.values())), recipe.vocabulary.size))
    write_bytes(job.work / "learn" / "tokenizer.model", tokenizer.serialized)
    return {"vocab_size": tokenizer.vocab_size, "sha256": hashlib.sha256(tokenizer.serialized).hexdigest()}


def token_dtype(vocab_size: int) -> str:
    """The smallest type that holds every id."""
    return "<u2" if vocab_size <= 65_536 else "<u4"


def _tokenize(job: Job, number: int) -> dict[str, Any]:
    part, folder = job.parts[number], job.work / "tokenize"
    tokenizer = Tokenizer.load(job.work / "learn" / "tokenizer.model")
    writer = TokenStoreWriter(
        folder, part.name, token_dtype(tokenizer.vocab_size), tokenizer.eos_id, job.recipe.shard_tokens
    )
    characters = 0
    of = iter(json.loads((job.work / "choose" / f"{part.name}.of.json").read_bytes()))
    reasons = {DUPLICATE: "duplicate", SIMILAR: "similar"}
    with _lines(folder / f"{part.name}.held_out.gz") as held, _lines(folder / f"{part.name}.dropped.gz") as dropped:
        for code, document in _chosen(job, part):
            if code == KEPT:
                writer.add(tokenizer.encode(document.text), len(document.text.encode()))
                characters += len(document.text)
            elif code == HELD_OUT:
                held.write({"text": document.text, "source": document.origin})
            else:
                dropped.write({"origin": document.origin, "reason": reasons[code], "of": next(of)})
    return {**writer.finish(), "characters": characters}


STAGES = (
    Stage("read", lambda job: len(job.parts), _read),
    Stage("match", lambda job: job.recipe.deduplicate.bands if job.recipe.deduplicate.minhash else 0, _match),
    Stage("choose", lambda job: 1, _choose),
    Stage("learn", lambda job: 1, _learn),
    Stage("tokenize", lambda job: len(job.parts), _tokenize),
)
