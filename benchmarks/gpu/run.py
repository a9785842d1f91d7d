"""Check and measure the cuda engine on this GPU; one JSON file.

    python benchmarks/gpu/run.py --out results.json                      # the 8B's shape, under 8 minutes
    python benchmarks/gpu/run.py --device cpu --tiny --out dry.json      # the same code in Triton's interpreter

Sections: checks, ceilings, quality (logits and greedy ids against the float32 reference), mlp (dense against sparse:
the engine's kernel table), decode, pairs (sparse against dense end to end), prefill, memory, baselines, ratios.
Each row is kept as soon as it is done; running again with the same file goes on with those that are missing or failed.
A section that the budget has no time for is listed as not measured. A row that fails holds its `error`, and the others
go on. Exit code 1 when a check does not hold or a row failed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

DEFAULT_BUDGET = 460
"""Seconds: under 8 minutes with the start of the program."""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file; an existing one is continued")
    parser.add_argument("--device", default="cuda", help="cuda (default), cuda:N, or cpu: Triton's interpreter")
    parser.add_argument("--preset", default="8b", help="shape (default: 8b)")
    parser.add_argument("--tiny", action="store_true", help="the `test` preset and the smallest cases: a dry run")
    parser.add_argument("--formats", default="bfloat16,q8,q4,p44", help="comma-separated; also fp8, float32")
    parser.add_argument("--active", type=float, default=0.10, help="share of active neurons (default: 0.10)")
    parser.add_argument("--budget", type=float, default=DEFAULT_BUDGET, help=f"seconds (default: {DEFAULT_BUDGET})")
    parser.add_argument("--layers", type=int, help="of the shape (default: all)")
    for name, what in (("batches", "batch sizes"), ("contexts", "contexts"), ("prompts", "lengths of prompts")):
        parser.add_argument(f"--{name}", default="", help=f"comma-separated {what} instead of the usual ones")
    parser.add_argument("--repeats", type=int, help="runs of which the median counts (default: 5)")
    parser.add_argument("--sections", default="", help="comma-separated; default all")
    parser.add_argument("--table", type=Path, help="where to write the kernel table (choice.py); default nowhere")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the sections that are missing."""
    started = time.monotonic()
    args = parse_arguments(arguments)
    if args.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    import sections

    bench = make_bench(args, started + args.budget)
    for name in chosen(args.sections, list(sections.SECTIONS), sections.NEEDS):
        run_section(name, sections.SECTIONS[name], bench)
        table = bench.kernel_table()
        if name == "mlp" and args.table is not None and table.mlp:
            table.save(args.table)
    failed = list(failures(bench.report))
    for line in failed:
        print(line, file=sys.stderr)
    print(json.dumps(bench.report))
    return 1 if failed else 0


def chosen(wanted: str, known: Sequence[str], needs: Mapping[str, Sequence[str]]) -> list[str]:
    """The sections to run, in order, with those that others read."""
    names = [name for name in wanted.split(",") if name] or list(known)
    for name in names:
        if name not in known:
            raise SystemExit(f"unknown section {name!r}; there are {', '.join(known)}")
    names += [needed for name in names for needed in needs.get(name, ())]
    return [name for name in known if name in names]


def run_section(name: str, section: Callable[[Any], Iterator[Any]], bench: Any) -> None:
    """Measure the rows of a section that are missing or failed before, keeping what is there after every row."""
    from cases import OutOfTime

    started = time.monotonic()
    entry = bench.report["sections"].setdefault(name, {"rows": [], "seconds": 0.0})
    entry["rows"] = [row for row in entry["rows"] if "error" not in row]
    entry |= {"complete": False, "note": "not measured: the time was up"}
    try:
        for case in section(bench):
            if any(case.key.items() <= row.items() for row in entry["rows"]):
                continue
            bench.check_time(case.seconds)
            entry["rows"].append(case.key | measured(case, bench))
            bench.save()
        entry["complete"] = True
        del entry["note"]
    except OutOfTime:
        if entry["rows"]:
            entry["note"] = "cut short: the time was up"
    entry["seconds"] = round(entry["seconds"] + time.monotonic() - started, 2)
    print(f"{name}: {entry['seconds']} s{'' if entry['complete'] else ', ' + entry['note']}", file=sys.stderr)
    bench.save()


def measured(case: Any, bench: Any) -> dict[str, Any]:
    """The row, or why there is none: a package that is missing, too little memory, a kernel that does not compile."""
    try:
        row: dict[str, Any] = case.measure()
    except Exception as error:
        row = {"error": f"{type(error).__name__}: {error}"[:2000]}
    # The exception is gone by now, and with it the frames that held tensors.
    try:
        bench.release()
    except RuntimeError as error:  # after a failed kernel the device answers nothing any more
        row.setdefault("error", f"{type(error).__name__}: {error}"[:2000])
    return row


def failures(report: dict[str, Any]) -> Iterator[str]:
    """A line for every row that failed or does not hold."""
    for name, section in report["sections"].items():
        for row in section["rows"]:
            about = ", ".join(f"{key} {value}" for key, value in row.items() if isinstance(value, (str, int)))
            if "error" in row:
                yield f"failed: {name}: {about}"
            elif row.get("holds") is False:
                yield f"does not hold: {name}: {about}"


def make_bench(args: argparse.Namespace, deadline: float) -> Any:
    """The Bench, with the report so far."""
    import torch
    from cases import Bench

    from persimmon.config import preset

    device = torch.device(args.device)
    config = preset("test" if args.tiny else args.preset)
    config = config.replace(num_layers=args.layers or config.num_layers)
    formats = [
        name.replace("bfloat16", "float32") if device.type == "cpu" else name for name in args.formats.split(",")
    ]
    identity = {
        "shape": "test" if args.tiny else args.preset, "layers": config.num_layers, "formats": formats,
        "active": args.active, "device": describe_device(device),
    }  # fmt: skip
    report = read_report(args.out, identity)

    def save() -> None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        partial = args.out.with_name(f"partial.{args.out.name}")
        partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        partial.replace(args.out)

    small = args.tiny

    def sizes(given: str, usual: list[int]) -> list[int]:
        return [int(part) for part in given.split(",")] if given else usual

    return Bench(
        config, device, formats, args.active,
        batches=sizes(args.batches, [1, 2] if small else [1, 2, 4, 8, 16, 32, 64]),
        contexts=sizes(args.contexts, [32, 64] if small else [32, 2_048, 8_192, 16_384]),
        prompts=sizes(args.prompts, [40] if small else [2_048, 8_192, 16_384]),
        decode_tokens=2 if small else 32, greedy_tokens=16 if small else 256,
        repeats=args.repeats or (1 if small else 5),
        deadline=deadline, report=report, save=save,
    )  # fmt: skip


def read_report(path: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """The file's report when it is about the same thing, else a new one."""
    if path.is_file():
        report = json.loads(path.read_text(encoding="utf-8"))
        if {key: report.get(key) for key in identity} == identity:
            return dict(report)
        raise SystemExit(f"{path} is about another shape, device or version; remove it or choose another file")
    return {"report": "gpu", **identity, "sections": {}}


def describe_device(device: Any) -> dict[str, Any]:
    """What was measured on."""
    import torch
    import triton

    facts: dict[str, Any] = {
        "name": platform.processor() or "cpu", "interpreted": device.type == "cpu", "torch": torch.__version__,
        "triton": triton.__version__, "python": platform.python_version(), "cuda": torch.version.cuda,
    }  # fmt: skip
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "name": properties.name, "memory": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}",
        }  # fmt: skip
    return facts


if __name__ == "__main__":
    raise SystemExit(main())
