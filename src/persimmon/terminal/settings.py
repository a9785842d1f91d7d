"""How answers are picked in a chat: the values behind `/set` and the flags of the same names."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any

from persimmon.errors import InputError
from persimmon.infer.params import SamplingParams

_ON_OFF = {"on": True, "yes": True, "true": True, "off": False, "no": False, "false": False}


def _setting(default: Any, kind: type, meaning: str) -> Any:
    return dataclasses.field(default=default, metadata={"kind": kind, "meaning": meaning})


@dataclass(frozen=True)
class Settings:
    """Sampling of the answers, and what happens when the context is full. Limits are those of SamplingParams."""

    temperature: float = _setting(0.7, float, "0 always takes the most likely token; higher is more varied")
    top_p: float = _setting(0.95, float, "keep the most likely tokens up to this sum of probabilities")
    top_k: int = _setting(0, int, "keep the k most likely tokens; 0 keeps all")
    min_p: float = _setting(0.0, float, "keep tokens at least this share as likely as the most likely one")
    repetition_penalty: float = _setting(1.0, float, "above 1 makes tokens that occurred before less likely")
    max_tokens: int = _setting(1024, int, "longest answer, in tokens")
    seed: int | None = _setting(None, int, "same seed, same answers; none draws a fresh one")
    drop_oldest: bool = _setting(False, bool, "on lets the oldest exchanges go when the context is full")

    def __post_init__(self) -> None:
        if not isinstance(self.drop_oldest, bool):
            raise InputError(f"drop_oldest must be true or false, got {self.drop_oldest!r}")
        self.sampling()

    def sampling(self, **changes: Any) -> dict[str, Any]:
        """Keyword arguments of `Persimmon.stream_chat`, checked; `changes` replace some."""
        values = dataclasses.asdict(self) | changes
        del values["drop_oldest"]
        SamplingParams.of(**values)
        return values

    def changed(self, name: str, text: str) -> Settings:
        """These settings with one value read from text. Raises InputError for an unknown name or a bad value."""
        field = find_setting(name)
        return dataclasses.replace(self, **{field.name: _read(field, text.strip())})

    def shown(self, name: str) -> str:
        """A value as `/set` prints and reads it."""
        value = getattr(self, name)
        if value is None:
            return "none"
        return ("on" if value else "off") if isinstance(value, bool) else f"{value:g}" if value < 1e6 else str(value)

    @classmethod
    def from_json(cls, values: Any) -> Settings:
        """Settings of a saved conversation; an unknown name or a bad value is an InputError."""
        if not isinstance(values, dict):
            raise InputError(f"settings must be an object, got {values!r}")
        return cls(**{find_setting(name).name: value for name, value in values.items()})


SETTINGS: dict[str, dataclasses.Field[Any]] = {field.name: field for field in dataclasses.fields(Settings)}


def find_setting(name: str) -> dataclasses.Field[Any]:
    """The setting of this name, spelled with `-` or `_`."""
    spelled = name.lower().replace("-", "_")
    if spelled not in SETTINGS:
        close = difflib.get_close_matches(spelled, SETTINGS, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(SETTINGS)}"
        raise InputError(f"no setting {name!r}; {hint}")
    return SETTINGS[spelled]


def _read(field: dataclasses.Field[Any], text: str) -> Any:
    kind = field.metadata["kind"]
    if kind is bool:
        if text.lower() not in _ON_OFF:
            raise InputError(f"{field.name} is on or off, got {text!r}")
        return _ON_OFF[text.lower()]
    if field.default is None and text.lower() == "none":
        return None
    try:
        return kind(text)
    except ValueError:
        wanted = "a whole number" if kind is int else "a number"
        raise InputError(f"{field.name} takes {wanted}, got {text!r}") from None
