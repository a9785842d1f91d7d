"""`persimmon import`: a checkpoint from elsewhere becomes a model directory."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from persimmon.cli.options import checked_source

if TYPE_CHECKING:
    from persimmon.checkpoints.releases import Release
    from persimmon.checkpoints.tensors import TensorData

HELP = "turn Adept's release files or a hub model into a model directory"

_SHOWN_DIFFERENCES = 10


def add_writing_options(parser: argparse.ArgumentParser) -> None:
    """The options of every verb that writes a model directory."""
    parser.add_argument("--force", action="store_true", help="replace the model in OUT if there is one")
    parser.add_argument(
        "--max-shard-gb", type=float, default=4.0, metavar="N", help="largest weight file in 10^9 bytes (default: 4)"
    )
    parser.add_argument("--json", action="store_true", help="print the result as one JSON document")
    parser.add_argument("--quiet", action="store_true", help="no notes and no progress on stderr")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("source", metavar="SRC", help="release tar or .pt, model directory, or hub id (ID@REVISION)")
    parser.add_argument("out", metavar="OUT", help="directory to write")
    parser.add_argument("--revision", metavar="NAME", help="revision of a hub model")
    parser.add_argument("--tokenizer", metavar="FILE", help="vocabulary of a .pt that has none near it")
    parser.add_argument(
        "--verify", action="store_true",
        help="check SRC against its checksums.json if it has one, and read OUT back bit for bit",
    )  # fmt: skip
    parser.add_argument("--compare", metavar="MODEL", help="also compare every tensor with another model's")
    add_writing_options(parser)


def shard_bytes(args: argparse.Namespace) -> int:
    """`--max-shard-gb` in bytes."""
    from persimmon.errors import InputError

    if not 0.001 <= args.max_shard_gb <= 1e6:
        raise InputError(f"--max-shard-gb must be from 0.001 to 1000000, got {args.max_shard_gb:g}")
    return int(args.max_shard_gb * 1e9)


def run(args: argparse.Namespace) -> int:
    """Execute the verb."""
    from persimmon.checkpoints.adept import is_release
    from persimmon.checkpoints.staging import CONFIG_FILE, check_target
    from persimmon.cli.console import note, print_json

    source, target = Path(args.source).expanduser(), Path(args.out)
    check_target(target, overwrite=args.force)
    adept = is_release(source) and not (source / CONFIG_FILE).is_file()
    tensors, facts = _import_release(args, source, target) if adept else _import_directory(args, target)
    for line in facts["notes"]:
        note(f"note: {line}", quiet=args.quiet)
    if args.verify:
        facts["verified_tensors"] = verify(tensors, target, quiet=args.quiet)
    if args.compare:
        facts["comparison"] = _compare(args, tensors)
    facts |= describe(target)
    if args.json:
        print_json(facts)
    else:
        print_summary("imported", facts)
    return 0


def _import_release(
    args: argparse.Namespace, source: Path, target: Path
) -> tuple[Mapping[str, TensorData], dict[str, Any]]:
    from persimmon.checkpoints.adept import open_release
    from persimmon.checkpoints.convert import write_release
    from persimmon.checkpoints.releases import licence_notice
    from persimmon.cli.console import Progress, note

    checkpoint = open_release(source, Path(args.tokenizer) if args.tokenizer else None)
    release, md5 = _identify(source, args.quiet)
    if release is not None:
        note(licence_notice(release), quiet=args.quiet)
    with Progress("writing", quiet=args.quiet) as progress:
        write_release(checkpoint, target, release=release, max_shard_bytes=shard_bytes(args), progress=progress)
    facts = {"md5": md5, "release": release.name if release else None, "notes": list(checkpoint.notes)}
    return checkpoint.tensors, facts


def _identify(source: Path, quiet: bool) -> tuple[Release | None, str | None]:
    """The published release that a tar is, by its MD5. A tar with another MD5 is a reason to warn."""
    from persimmon.checkpoints.adept import looks_like_tar, md5_of
    from persimmon.checkpoints.releases import RELEASES, by_md5
    from persimmon.cli.console import Progress, warn

    if not source.is_file() or not looks_like_tar(source):
        return None, None
    with Progress("checking MD5", quiet=quiet) as progress:
        md5 = md5_of(source, progress)
    release = by_md5(md5)
    if release is None:
        expected = next((f"; {r.tar} has {r.tar_md5}" for r in RELEASES if r.tar == source.name), "")
        warn(f"{source}: MD5 {md5} is not that of a published release{expected}")
    return release, md5


def _import_directory(args: argparse.Namespace, target: Path) -> tuple[Mapping[str, TensorData], dict[str, Any]]:
    from persimmon.checkpoints.checksums import verify_checksums
    from persimmon.checkpoints.convert import write_copy
    from persimmon.checkpoints.directory import open_directory
    from persimmon.checkpoints.download import resolve
    from persimmon.cli.console import Progress

    directory = resolve(args.source, revision=args.revision)
    facts: dict[str, Any] = {}
    if args.verify:
        with Progress("checking SHA-256", quiet=args.quiet) as progress:
            facts["verified_files"] = verify_checksums(directory, progress)
    else:
        checked_source(directory, quiet=args.quiet)
    opened = open_directory(directory)
    with Progress("writing", quiet=args.quiet) as progress:
        tensors, notes = write_copy(opened, target, max_shard_bytes=shard_bytes(args), progress=progress)
    return tensors, {**facts, "notes": notes}


def verify(tensors: Mapping[str, TensorData], target: Path, *, quiet: bool) -> int:
    """Read a written directory back and compare it with what should be in it: the number of tensors."""
    from persimmon.checkpoints.convert import compare
    from persimmon.checkpoints.directory import open_directory
    from persimmon.cli.console import Progress
    from persimmon.errors import CheckpointError

    with Progress("verifying", quiet=quiet) as progress:
        result = compare(tensors, open_directory(target).tensors, progress)
    if result.differing:
        name, how = next(iter(result.differing.items()))
        raise CheckpointError(f"{target}: {len(result.differing)} tensors are not as in the source; {name}: {how}")
    return result.equal


def _compare(args: argparse.Namespace, tensors: Mapping[str, TensorData]) -> dict[str, Any]:
    from persimmon.checkpoints.convert import compare
    from persimmon.checkpoints.directory import open_directory
    from persimmon.checkpoints.download import resolve
    from persimmon.cli.console import Progress

    other = open_directory(resolve(args.compare))
    with Progress("comparing", quiet=args.quiet) as progress:
        result = compare(tensors, other.tensors, progress)
    return {"with": args.compare, "equal": result.equal, "differing": result.differing}


def describe(target: Path) -> dict[str, Any]:
    """What a written directory holds."""
    import math

    from persimmon.checkpoints.directory import open_directory
    from persimmon.checkpoints.releases import licence_of

    written = open_directory(target)
    files = {tensor.file for tensor in written.tensors.values()}
    return {
        "directory": str(target),
        "parameters": sum(math.prod(tensor.shape) for tensor in written.tensors.values()),
        "dtype": written.dtype,
        "weight_files": len(files),
        "weight_bytes": sum(file.stat().st_size for file in files),
        "licence": licence_of(target),
    }


def print_summary(done: str, facts: Mapping[str, Any]) -> None:
    """The result for a person."""
    from persimmon.cli.info import size

    files = "1 file" if facts["weight_files"] == 1 else f"{facts['weight_files']} files"
    print(f"{done} to {facts['directory']}")
    print(f"  {facts['parameters']:,} parameters, {facts['dtype']}, {size(facts['weight_bytes'])} in {files}")
    if facts["licence"]:
        print(f"  licence {facts['licence']}")
    if facts.get("verified_files"):
        print(f"  source verified: {facts['verified_files']} files have the SHA-256 of their list")
    if facts.get("verified_tensors"):
        print(f"  verified: {facts['verified_tensors']} tensors read back bit for bit")
    if "comparison" in facts:
        comparison = facts["comparison"]
        differing = comparison["differing"]
        print(f"  compared with {comparison['with']}: {comparison['equal']} tensors equal, {len(differing)} not")
        for name, how in list(differing.items())[:_SHOWN_DIFFERENCES]:
            print(f"    {name}: {how}")
