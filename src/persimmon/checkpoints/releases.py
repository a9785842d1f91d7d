"""The published Persimmon models: where they are, and under which licence. No torch."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

CARD_FILE = "README.md"


@dataclass(frozen=True)
class Release:
    """One published model. Sources: adept-inference README.md, the hub's model cards."""

    name: str
    """What users call it here."""
    hub_id: str
    tar: str
    """File name of Adept's own release."""
    tar_md5: str
    licence: str
    """SPDX identifier."""
    note: str
    """What the licence means for users."""


RELEASES = (
    Release(
        "persimmon-8b-base", "adept/persimmon-8b-base", "8b_base_model_release.tar",
        "cd0320cba9efad9ccd18e9ec4d16ae1b", "Apache-2.0", "free for any use",
    ),
    Release(
        "persimmon-8b-chat", "adept/persimmon-8b-chat", "8b_chat_model_release.tar",
        "663aeace07269c44e90f4e8bcd07f32a", "CC-BY-NC-4.0",
        "for non-commercial use only, and so is everything derived from these weights",
    ),
)  # fmt: skip

_SPDX = {release.licence.lower(): release.licence for release in RELEASES}


def by_name(name: str) -> Release | None:
    """The release with this name or hub id."""
    return next((release for release in RELEASES if name.lower() in (release.name, release.hub_id)), None)


def by_md5(md5: str) -> Release | None:
    """The release whose tar has this MD5."""
    return next((release for release in RELEASES if release.tar_md5 == md5), None)


def licence_notice(release: Release) -> str:
    """One line for a person about to use the weights."""
    return f"{release.hub_id}: licence {release.licence}, {release.note}"


def licence_of(directory: Path) -> str | None:
    """The licence that a model directory's card (README.md) declares in its front matter."""
    card = directory / CARD_FILE
    if not card.is_file():
        return None
    front = re.match(r"---\n(.*?)\n---", card.read_text(errors="replace"), re.DOTALL)
    found = front and re.search(r"^license:[ \t]*['\"]?([\w.+-]+)", front[1], re.MULTILINE)
    return _SPDX.get(found[1].lower(), found[1]) if found else None


def write_card(release: Release, directory: Path) -> None:
    """A model card for a directory converted from a release's tar, so that its licence travels with it."""
    (directory / CARD_FILE).write_text(
        f"---\nlicense: {release.licence.lower()}\nbase_model: {release.hub_id}\n---\n\n"
        f"# {release.name}\n\nConverted from `{release.tar}` (MD5 {release.tar_md5}), published by Adept AI Labs.\n"
        f"Licence: {release.licence}, {release.note}.\n"
    )


def derived_notice(directory: Path) -> str | None:
    """One line on the licence of what is made from a model, where its card states a non-commercial one."""
    licence = licence_of(directory)
    if licence is None or "-NC" not in licence.upper():
        return None
    return (
        f"The base model's licence is {licence}: what is trained from it or merged with it is for "
        "non-commercial use only, too."
    )


def write_derived_card(
    directory: Path, base: str, base_directory: Path, what: str, *, library: str | None = None
) -> None:
    """A model card for what was trained from a model: its base, its licence and one sentence on what it is.

    base: as the user named it. library: the one that others load it with.
    """
    release, licence = by_name(base), licence_of(base_directory)
    shown = release.hub_id if release else base
    lines = ["---", f"base_model: {json.dumps(shown)}"]
    lines += [f"library_name: {library}"] if library else []
    lines += [f"license: {licence.lower()}"] if licence else []
    lines += ["---", "", f"# Trained from {shown}", "", what]
    notice = derived_notice(base_directory)
    (directory / CARD_FILE).write_text("\n".join([*lines, *([notice] if notice else [])]) + "\n")
