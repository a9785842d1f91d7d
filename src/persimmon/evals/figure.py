"""The comparison as a figure: one panel per style, groups of bars per task, chance marked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from persimmon.evals import published
from persimmon.evals.compare import Run, rows
from persimmon.evals.tasks import TASKS
from persimmon.figures import load_pyplot, save_figure

# Distinguishable without colour vision (Okabe and Ito), persimmon's own orange first.
_OURS = ("#D55E00", "#E69F00", "#CC79A7", "#009E73")
_STANDING = "published scores: only MMLU 41.2 (FT) is verified, see the table"
_PUBLISHED = ("#9AA5B1", "#616E7C", "#7FB3D5", "#0072B2")


def draw(runs: Sequence[Run], paths: Sequence[Path]) -> None:
    """Write the figure to every path, in the format of its ending (png, svg).

    Raises UnavailableError without matplotlib.
    """
    pyplot = load_pyplot("eval")
    shares = [pair for pair in rows(runs, with_release=True) if TASKS[pair[0]].name != "perplexity"]
    styles = [style for style in ("adept", "loglikelihood") if any(pair[1] == style for pair in shares)]
    # Text as paths would make the same figure differ between machines; a fixed salt keeps the ids the same.
    with pyplot.rc_context({"svg.fonttype": "none", "svg.hashsalt": "persimmon", "font.size": 10}):
        figure, axes = pyplot.subplots(
            max(1, len(styles)), 1, figsize=(10, 4.2 * max(1, len(styles))), squeeze=False, layout="constrained"
        )
        for axis, style in zip(axes[:, 0], styles, strict=False):
            _panel(axis, runs, style, [task for task, of in shares if of == style])
        figure.supxlabel(_STANDING, x=0.99, ha="right", fontsize=8, color="#616E7C")
        figure.canvas.draw()
        figure.set_layout_engine("none")  # laid out once, so that every file shows the same
        for path in paths:
            save_figure(figure, path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
        pyplot.close(figure)


def _panel(axis: Any, runs: Sequence[Run], style: str, tasks: Sequence[str]) -> None:
    """Bars of one style: ours with intervals, then the published ones where there are any."""
    models = [m for m in published.MODELS if any(published.find(task, m, style) for task in tasks)]
    ours = [(run, _OURS[number % len(_OURS)]) for number, run in enumerate(runs)]  # a run's colour in every panel
    ours = [(run, colour) for run, colour in ours if any(run.find(task, style) for task in tasks)]
    count = max(1, len(ours) + len(models))
    width = min(0.18, 0.84 / count)
    middle = (count - 1) * width / 2  # of a group, from its first bar's middle
    for number, (run, colour) in enumerate(ours):
        _our_bars(axis, run, style, tasks, colour, number * width, width * 0.94)
    for number, model in enumerate(models, len(ours)):
        about = published.MODELS[model]
        values = [(index + number * width, published.find(task, model, style)) for index, task in enumerate(tasks)]
        axis.bar(
            [place for place, value in values if value], [value.percent for _, value in values if value],
            width * 0.94, label=f"{about.name}, {about.shots}-shot (published)",
            color=_PUBLISHED[(number - len(ours)) % len(_PUBLISHED)],
        )  # fmt: skip
    for index, task in enumerate(tasks):
        if TASKS[task].chance:
            chance = 100 * TASKS[task].chance
            label = "chance" if index == 0 else None
            span = (index - width * 0.6, index + 2 * middle + width * 0.6)
            axis.hlines(chance, *span, color="#222222", linestyle=(0, (3, 2)), linewidth=1, label=label)
    axis.set_xticks([index + middle for index in range(len(tasks))], [TASKS[task].title for task in tasks])
    _dress(axis, "answers generated and parsed (adept style)" if style == "adept" else "harness style (loglikelihood)")


def _our_bars(axis: Any, run: Run, style: str, tasks: Sequence[str], colour: str, shift: float, width: float) -> None:
    """The bars of one run with its intervals, its scores above them; a task it has not run has no bar."""
    scores = [run.find(task, style) for task in tasks]
    places = [index + shift for index, score in enumerate(scores) if score]
    known = [score for score in scores if score]
    errors = [
        [score.value - (score.value if score.low is None else score.low) for score in known],
        [(score.value if score.high is None else score.high) - score.value for score in known],
    ]
    axis.bar(
        places, [score.value for score in known], width, yerr=errors, label=run.label,
        color=colour, error_kw={"elinewidth": 1, "capsize": 2},
    )  # fmt: skip
    for place, score in zip(places, known, strict=True):
        top = score.value if score.high is None else score.high
        axis.annotate(f"{score.value:.1f}", (place, top), (0, 2), textcoords="offset points", ha="center", fontsize=8)


def _dress(axis: Any, title: str) -> None:
    """Titles, scale, grid and legend."""
    axis.set_ylabel("score, %")
    axis.set_title(title, loc="left", fontsize=11)
    axis.set_ylim(0, None)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#E4E7EB", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.legend(frameon=False, fontsize=8.5, ncols=3, loc="lower left", bbox_to_anchor=(0, 1.08))
