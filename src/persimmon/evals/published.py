"""The scores that others published, and what stands behind each number.

The release's table is generated answers under its own prompts (see `tasks`); numbers of other styles, shots or prompt
sets are not comparable with it, and every row therefore carries them. `verified` means that the number itself was
read in a source that can still be opened; the others are quoted as they are remembered from the announcement
and have to be checked there before they are relied on.
"""

from __future__ import annotations

from dataclasses import dataclass

RELEASE = "https://www.adept.ai/blog/persimmon-8b"
SGLANG = "https://github.com/sgl-project/sglang/pull/7983"


@dataclass(frozen=True)
class Model:
    """A column of the table."""

    name: str
    shots: int


MODELS = {
    "mpt-7b-instruct": Model("MPT-7B-Instruct", 1),
    "llama-2-7b": Model("Llama 2 7B", 1),
    "persimmon-8b-base": Model("Persimmon-8B base", 5),
    "persimmon-8b-chat": Model("Persimmon-8B FT", 1),
}


@dataclass(frozen=True)
class Published:
    """One published score."""

    task: str
    model: str
    percent: float
    shots: int
    style: str
    source: str
    verified: bool
    note: str = ""


_RELEASE_TABLE = {
    # task: MPT-7B-Instruct, Llama 2 7B, Persimmon base, Persimmon FT, in percent
    "mmlu": (27.6, 36.6, 36.5, 41.2),
    "winogrande": (49.1, 51.1, 51.4, 54.6),
    "arc_easy": (32.5, 53.7, 48.1, 64.0),
    "arc_challenge": (28.8, 43.8, 42.2, 46.8),
    "triviaqa": (33.9, 36.8, 26.9, 28.3),
    "humaneval": (12.8, 9.2, 18.9, 20.7),
}

# The one cell that a second, open source repeats: the pull request quotes it as the release's reference value.
_VERIFIED = {("mmlu", "persimmon-8b-chat")}

_UNSURE = {("humaneval", "llama-2-7b"), *(("triviaqa", model) for model in MODELS)}


def _release(task: str, model: str, percent: float) -> Published:
    verified = (task, model) in _VERIFIED
    note = "low confidence" if (task, model) in _UNSURE else ""
    source = f"{RELEASE}, repeated in {SGLANG}" if verified else RELEASE
    return Published(task, model, percent, MODELS[model].shots, "adept", source, verified, note)


PUBLISHED: tuple[Published, ...] = (
    *(
        _release(task, model, percent)
        for task, row in _RELEASE_TABLE.items()
        for model, percent in zip(MODELS, row, strict=True)
    ),
    Published(
        "mmlu",
        "persimmon-8b-chat",
        45.2,
        5,
        "sglang",
        SGLANG,
        verified=True,
        note="an independent measurement, in SGLang and vLLM alike, with SGLang's script; four points above the "
        "release's, so never quote MMLU without style and prompts",
    ),
)


def find(task: str, model: str, style: str = "adept") -> Published | None:
    """The published score of a task and model in a style, or None."""
    return next((p for p in PUBLISHED if (p.task, p.model, p.style) == (task, model, style)), None)
