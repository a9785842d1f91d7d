"""Figures as files: matplotlib without a screen, and where it is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from persimmon.atomic import replacing
from persimmon.errors import InputError, UnavailableError


def load_pyplot(extra: str) -> Any:
    """Pyplot, drawing into files; UnavailableError names the `extra` that brings it."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise UnavailableError(f"figures need matplotlib: pip install 'persimmon[{extra}]'") from None
    return pyplot


def save_figure(figure: Any, path: Path, **options: Any) -> None:
    """Write a figure whole, in the format of its ending; `options` are those of matplotlib's `savefig`.

    Raises InputError for an ending that matplotlib does not know.
    """
    known = figure.canvas.get_supported_filetypes()
    kind = path.suffix[1:].lower()
    if kind not in known:
        raise InputError(f"a figure's file ends in one of {', '.join(sorted(known))}, got {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        figure.savefig(partial, format=kind, **options)
