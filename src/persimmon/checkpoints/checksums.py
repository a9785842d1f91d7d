"""`checksums.json`: SHA-256 and size of every file of a model directory, because safetensors files carry none.

Loading checks structure and sizes, which catches every truncation. Damage inside the numbers shows only here: verbs
that read a whole model to write another compare its weights first, and loading does so for small models.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from persimmon.checkpoints.shards import FileDigest, ProgressReport, no_progress, read_json
from persimmon.checkpoints.tensors import CHUNK_BYTES
from persimmon.errors import CheckpointError

CHECKSUM_FILE = "checksums.json"
_WEIGHT_SUFFIXES = (".safetensors", ".bin")


def write_checksums(directory: Path, known: Mapping[str, FileDigest]) -> None:
    """List every file of the directory; `known` has the digests taken while the large ones were written."""
    files = {}
    for file in sorted(directory.iterdir()):
        digest = known.get(file.name) or _digest(file, lambda count: None)
        files[file.name] = dataclasses.asdict(digest)
    document = {"algorithm": "sha256", "files": files}
    (directory / CHECKSUM_FILE).write_text(json.dumps(document, indent=2) + "\n")


def verify_checksums(
    directory: Path, progress: ProgressReport = no_progress, *, weights_only: bool = False
) -> int | None:
    """Compare every file with the list: the number of files, or None where there is no list.

    weights_only: leave the small files aside, which people may edit. Raises CheckpointError naming the first file that
    differs.
    """
    if not (directory / CHECKSUM_FILE).is_file():
        return None
    document = read_json(directory / CHECKSUM_FILE)
    try:
        expected = {Path(name).name: FileDigest(**facts) for name, facts in document["files"].items()}
        if weights_only:
            expected = {name: digest for name, digest in expected.items() if name.endswith(_WEIGHT_SUFFIXES)}
        total = sum(digest.size for digest in expected.values())
    except (TypeError, KeyError, AttributeError):
        raise CheckpointError(f"{directory / CHECKSUM_FILE}: not a list of checksums") from None
    done = 0

    def report(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    for name, digest in expected.items():
        if not (directory / name).is_file():
            raise CheckpointError(f"{directory / name} is missing: {CHECKSUM_FILE} lists it")
        found = _digest(directory / name, report)
        if found != digest:
            raise CheckpointError(
                f"{directory / name} is damaged or was changed: {digest.size} bytes with SHA-256 {digest.sha256} "
                f"expected, {found.size} bytes with {found.sha256} found"
            )
    return len(expected)


def _digest(file: Path, report: Callable[[int], None]) -> FileDigest:
    digest, size = hashlib.sha256(), 0
    with file.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
            report(len(chunk))
    return FileDigest(size, digest.hexdigest())
