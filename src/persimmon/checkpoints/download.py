"""From the name of a model to its directory: shipped models, directories, the Hugging Face Hub. No torch.

The hub client does the work, so `HF_HOME`, `HF_TOKEN`, `HF_ENDPOINT` and `HF_HUB_OFFLINE` mean what they mean
everywhere; it shows its progress on stderr and shares its cache with other programs. A broken connection goes on where
it broke; a download that was given up goes on with the first file that is not finished. What is in the cache is used
as it is, without asking the hub.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from persimmon.checkpoints.directory import has_weights, read_config
from persimmon.checkpoints.releases import RELEASES, by_name, licence_notice
from persimmon.config import ModelConfig
from persimmon.errors import InputError, NotFoundError, PersimmonError, UnavailableError

SHIPPED = ("mini", "mini-base")
_ASSETS = Path(__file__).resolve().parent.parent / "assets"

_SMALL_FILES = ["*.json", "tokenizer.model", "*.jinja", "README.md", "LICENSE*", "NOTICE*"]
_SAFETENSORS = ["model*.safetensors"]
_PYTORCH = ["pytorch_model*.bin"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")


def resolve(
    name: str | os.PathLike[str],
    *,
    revision: str | None = None,
    weights: bool = True,
    notice: Callable[[str], None] | None = None,
) -> Path:
    """The directory of a model.

    `name`: a directory, a shipped model (`mini`, `mini-base`), a release (`persimmon-8b-base`, `persimmon-8b-chat`)
    or a hub id, the last two with `@revision` if wanted. What is on the hub is downloaded; without `weights` only
    configuration, tokenizer and card. `notice` gets the licence before a release is fetched (default: stderr).
    """
    text = os.fspath(name)
    if text in SHIPPED and not Path(text).is_dir():
        return _shipped(text)
    path = Path(text).expanduser()
    if text and path.is_dir():
        return path
    plain, _, tag = text.partition("@")
    release = by_name(plain)
    if release is None and not _HUB_ID.fullmatch(text):
        raise NotFoundError(f"no model {text!r}: not a directory, not a hub id, and not one of {_known_names()}")
    if path.exists():
        raise InputError(f"{text} is a file; `persimmon import` makes a model directory of a release")
    if tag and revision and tag != revision:
        raise InputError(f"two revisions: {tag!r} in {text!r} and {revision!r}")
    hub_id, revision = release.hub_id if release else plain, revision or tag or None
    cached = _in_cache(hub_id, revision, weights)
    if cached is None and release is not None:
        (notice or _to_stderr)(licence_notice(release))
    return cached or _fetch(hub_id, revision, weights)


def model_config(name: str | os.PathLike[str]) -> ModelConfig:
    """The configuration of a model by name; of one on the hub, no weights are fetched for it."""
    return read_config(resolve(name, weights=False, notice=lambda line: None))


def _known_names() -> str:
    return ", ".join([*SHIPPED, *(release.name for release in RELEASES)])


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _shipped(name: str) -> Path:
    path = _ASSETS / name
    if not path.is_dir():
        raise NotFoundError(f"the shipped model {name!r} is missing from this installation ({path})")
    return path


def _in_cache(hub_id: str, revision: str | None, weights: bool) -> Path | None:
    """The cached snapshot, when it is complete."""
    import huggingface_hub
    from huggingface_hub import errors

    patterns = _SMALL_FILES + (_SAFETENSORS if weights else [])
    try:
        found = huggingface_hub.snapshot_download(
            hub_id, revision=revision, allow_patterns=patterns, local_files_only=True
        )
    except (errors.LocalEntryNotFoundError, errors.HFValidationError):
        return None
    directory = Path(found)
    complete = has_weights(directory) if weights else (directory / "config.json").is_file()
    return directory if complete else None


def _fetch(hub_id: str, revision: str | None, weights: bool) -> Path:
    """Download; safetensors where the repository has them, else PyTorch's files."""
    import huggingface_hub
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()

    def snapshot(patterns: list[str]) -> Path:
        return Path(huggingface_hub.snapshot_download(hub_id, revision=revision, allow_patterns=patterns))

    try:
        directory = snapshot(_SMALL_FILES + (_SAFETENSORS if weights else []))
        if weights and not any(directory.glob(_SAFETENSORS[0])):
            directory = snapshot(_SMALL_FILES + _PYTORCH)
    except Exception as error:
        raise _explain(error, hub_id, revision) from error
    if weights and not has_weights(directory):
        raise NotFoundError(
            f"{hub_id}: the weights are not all on the hub, or not all in the cache while it is offline"
        )
    return directory


def _explain(error: Exception, hub_id: str, revision: str | None) -> PersimmonError:
    """The hub client's error in our words."""
    from huggingface_hub import constants, errors

    shown = f"{hub_id}@{revision}" if revision else hub_id
    if isinstance(error, errors.GatedRepoError):
        return UnavailableError(f"{shown} needs permission: accept its terms on the hub and set HF_TOKEN")
    if isinstance(error, errors.RevisionNotFoundError):
        return NotFoundError(f"{hub_id} has no revision {revision!r} on the hub")
    if isinstance(error, errors.RepositoryNotFoundError):
        return NotFoundError(f"the hub has no model {hub_id!r} (or it is private: set HF_TOKEN)")
    if isinstance(error, errors.LocalEntryNotFoundError | errors.OfflineModeIsEnabled):
        if constants.HF_HUB_OFFLINE:
            return UnavailableError(f"{shown} is not in the cache, and HF_HUB_OFFLINE forbids to download it")
        return UnavailableError(f"{shown} is not in the cache, and {constants.ENDPOINT} cannot be reached")
    if isinstance(error, errors.HFValidationError):
        return InputError(f"not a hub id: {error}")
    return UnavailableError(f"downloading {shown} failed: {error}")
