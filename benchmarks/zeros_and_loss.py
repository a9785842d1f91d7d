"""What zeros cost in loss: short pretraining runs that differ in how the zeros are asked for, and pairs of long ones.

    python benchmarks/zeros_and_loss.py DATA RUNS [--pair NAME PLAIN ZEROS]... [--plot docs/images/zeros-and-loss.png]

DATA is the output of `persimmon data prepare`; the pilots of `PILOTS` go to folders below RUNS, and those that are
finished there are read and not run again. All share configs/mini.yaml, seed, data order and length. `--pair` compares
the metrics.jsonl of two full runs at every evaluation that both have, one without and one with a penalty.

Writes benchmarks/results/zeros-and-loss.json and prints it. Nothing but the held-out bits per byte, the share of zeros
and the silent neurons of the last batches is compared: speed is not measured here.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import persimmon
from persimmon.atomic import write_text
from persimmon.figures import load_pyplot, save_figure
from persimmon.train.plot import read_metrics

ROOT = Path(__file__).parent.parent
TOKENS, BATCH = 700_000, 4096
"""Of a pilot: 171 steps."""
LAST_STEPS = 10
"""Steps whose zeros are averaged."""
_FAR = 0.05
"""Of the best loss: pilots beyond are named in the picture and not drawn, as the others would become one dot."""


def _l1(weight: float, target: float, start: float = 0.0) -> list[str]:
    lift = 1.0 if target < 1 else 0.0
    return [
        f"loop.sparsity_penalty={weight}",
        f"loop.sparsity_target={target}",
        f"loop.sparsity_lift={lift}",
        f"loop.sparsity_start={start}",
    ]


_ADAMW = ["loop.optimizer.matrices=adamw", "loop.optimizer.matrix_lr=0.003"]

PILOTS = {
    "Muon, none": _l1(0, 1.0),
    "Muon, L1 0.25 to 95 %": _l1(0.25, 0.95),
    "Muon, L1 0.5 to 90 %": _l1(0.5, 0.90),
    "Muon, L1 0.5 to 95 %": _l1(0.5, 0.95),
    "Muon, L1 0.5 to 98 %": _l1(0.5, 0.98),
    "Muon, L1 1.0 to 95 %": _l1(1.0, 0.95),
    "Muon, L1 0.5, no target": _l1(0.5, 1.0),
    "Muon, L1 0.5 to 95 % from 2/3 on": _l1(0.5, 0.95, start=0.667),
    "AdamW, none": [*_l1(0, 1.0), *_ADAMW],
    "AdamW, L1 0.5 to 95 %": [*_l1(0.5, 0.95), *_ADAMW],
}


def run_pilot(data: Path, directory: Path, settings: list[str]) -> None:
    """Train one pilot, or finish one that was interrupted."""
    changes = [
        f"data={data}",
        f"output={directory}",
        f"tokens={TOKENS}",
        f"phases=[{{share: 1.0, row_length: 1024, batch_tokens: {BATCH}}}]",
        "loop.evaluate_every=0",
        *settings,
    ]
    command = [sys.executable, "-m", "persimmon.cli.main", "pretrain", str(ROOT / "configs/mini.yaml"), "--quiet"]
    if (directory / "checkpoints").is_dir():
        command.append("--resume")
    subprocess.run([*command, *(part for change in changes for part in ("--set", change))], check=True)


def _figures(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Held-out bits per byte of `row`, and zeros of the last of the `rows` up to it."""
    last = rows[-LAST_STEPS:]
    return {
        "tokens": row["tokens"],
        "held_out": row["held_out"],
        "zeros_per_layer": [
            round(sum(r["zeros"][n] for r in last) / len(last), 4) for n in range(len(last[0]["zeros"]))
        ],
        "silent_per_layer": last[-1]["silent"],
    }


def pilot(name: str, data: Path, directory: Path) -> dict[str, Any]:
    """The figures of a pilot, which is run if it is not finished."""
    metrics = directory / "metrics.jsonl"
    rows = read_metrics(metrics) if metrics.is_file() else []
    if not rows or "held_out" not in rows[-1]:
        run_pilot(data, directory, PILOTS[name])
        rows = read_metrics(metrics)
    return {"name": name, "settings": PILOTS[name], **_figures(rows[-1], rows)}


def pairs(plain: Path, zeros: Path) -> list[dict[str, Any]]:
    """Both runs at every evaluation that both have, and the relative difference in bits per byte."""
    first, second = (evaluations(read_metrics(path)) for path in (plain, zeros))
    result = []
    for step in sorted(first.keys() & second.keys()):
        without, having = first[step], second[step]
        cost = {name: round(having["held_out"][name] / bits - 1, 5) for name, bits in without["held_out"].items()}
        result.append({"step": step, "plain": without, "zeros": having, "cost": cost})
    return result


def evaluations(rows: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The figures of every step that was evaluated."""
    return {row["step"]: _figures(row, rows[:number]) for number, row in enumerate(rows, 1) if "held_out" in row}


def plot(result: dict[str, Any], picture: Path) -> None:
    """Left: the pilots, loss over zeros; right: what the zeros cost over the long pair."""
    pyplot = load_pyplot("train")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.6), constrained_layout=True)
    losses = [fmean(entry["held_out"].values()) for entry in result["pilots"]]
    far = min(losses) * (1 + _FAR)
    for number, (entry, loss) in enumerate(zip(result["pilots"], losses, strict=True)):
        zeros = 100 * fmean(entry["zeros_per_layer"][1:])
        if loss > far:
            left.plot([], [], " ", label=f"outside: {entry['name']}, {loss:.2f} at {zeros:.0f} %")
            continue
        left.scatter(zeros, loss, s=45, marker="os^vDP*X<>"[number % 10], label=entry["name"])
    left.legend(fontsize=7)
    left.set(
        title=f"pilots of {TOKENS / 1e6:.1f} million tokens", xlabel="zeros in all but the first layer, %",
        ylabel="held-out bits per byte, mean of the sources",
    )  # fmt: skip
    for number, pair in enumerate(result["pairs"]):
        for source, style in zip(pair["rows"][0]["cost"], itertools.cycle(("--", "-", ":", "-.")), strict=False):
            points = [(row["zeros"]["tokens"] / 1e6, 100 * row["cost"][source]) for row in pair["rows"]]
            label = f"{pair['name']}: {source}"
            right.plot(*zip(*points, strict=True), style, color=f"C{number}", marker="o", markersize=3, label=label)
    right.axhline(0, color="#1c1917", linewidth=0.8)
    right.set(title="full trainings: with zeros against without", xlabel="million tokens", ylabel="bits per byte, %")
    for axis in (left, right):
        axis.grid(alpha=0.25)
    if result["pairs"]:
        right.legend(fontsize=7)
    save_figure(figure, picture, dpi=110)
    pyplot.close(figure)


def main() -> None:
    """Run what is missing, write the row, draw it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("runs", type=Path)
    parser.add_argument(
        "--pair", nargs=3, action="append", default=[], metavar=("NAME", "PLAIN", "ZEROS"),
        help="metrics.jsonl of two full runs; may be repeated",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/zeros-and-loss.json")
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    pilots = []
    for number, name in enumerate(PILOTS):
        print(f"{number + 1} of {len(PILOTS)}: {name}", file=sys.stderr)
        pilots.append(pilot(name, args.data, args.runs / f"pilot-{number:02}"))
    result = {
        "pilots": pilots,
        "pairs": [{"name": name, "rows": pairs(Path(plain), Path(zeros))} for name, plain, zeros in args.pair],
        "versions": {"persimmon": persimmon.__version__},
    }
    write_text(args.out, json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))
    if args.plot:
        plot(result, args.plot)


if __name__ == "__main__":
    main()
