"""Detectors on the Hugging Face Hub, by its library."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import ModelHubMixin, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from cascade_det.engine.output_dir import CONFIG_FILE
from cascade_det.errors import ConfigError, DownloadError
from cascade_det.facade.pretrained import WEIGHTS_FILE
from cascade_det.text import printable

_CARD = """\
---
{{ card_data }}
---

# An object detector of cascade_det

```python
from cascade_det import CascadeDetector

detector = CascadeDetector.from_pretrained("hf://{{ repo_id }}")
detections = detector.predict("image.jpg")
```
"""


class Upload(
    ModelHubMixin,
    model_card_template=_CARD,
    library_name="cascade_det",
    pipeline_tag="object-detection",
    tags=["object-detection", "cascade-rcnn", "early-exit"],
):
    """A detector's files, for the mixin's ``push_to_hub``, which adds a model card.

    Args:
        write: writes them into a folder.
    """

    def __init__(self, write: Callable[[Path], None]) -> None:
        self._write = write

    def _save_pretrained(self, save_directory: Path) -> None:
        self._write(save_directory)


def download(name: str, revision: str | None) -> Path:
    """The folder with ``config.yaml`` and ``model.safetensors`` of a repository.

    No other file is fetched. They are kept in the library's cache, and fetched again only if they
    changed. ``HF_TOKEN``, ``HF_ENDPOINT``, ``HF_HOME`` and ``HF_HUB_OFFLINE`` have their effect.

    Args:
        name: "owner/name".
        revision: a branch, tag or commit; ``None`` for the newest.

    Raises:
        ConfigError: ``name`` is not the name of a repository.
        DownloadError: there is no such repository or file, or it cannot be reached.
    """
    try:
        files = [
            hf_hub_download(name, file, revision=revision) for file in (CONFIG_FILE, WEIGHTS_FILE)
        ]
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        raise _told(name, error) from error
    config_file, weights = map(Path, files)
    if config_file.parent != weights.parent:
        raise DownloadError(f"hf://{name}: it changed during the download. Try again.")
    return weights.parent


def push(name: str, write: Callable[[Path], None], arguments: dict[str, Any]) -> str:
    """Upload a detector's files in one commit; the repository is made if it is missing.

    Args:
        name: "owner/name".
        write: writes the files into a folder.
        arguments: of ``ModelHubMixin.push_to_hub``, such as ``private``.

    Returns:
        The address of the commit.

    Raises:
        ConfigError: ``name`` is not the name of a repository.
        DownloadError: the Hub cannot be reached, or refuses.
    """
    try:
        card = {"repo_id": name, **arguments.pop("model_card_kwargs", {})}
        return str(Upload(write).push_to_hub(name, model_card_kwargs=card, **arguments))
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        raise _told(name, error) from error


def _told(name: str, error: Exception) -> ConfigError | DownloadError:
    """What to tell of an error of the library."""
    reason = printable(str(error).strip().partition("\n")[0] or type(error).__name__)
    if isinstance(error, HFValidationError):
        return ConfigError(f"hf://{name}: {reason}")
    if isinstance(error, RepositoryNotFoundError):
        reason = f"no such repository, or a private one and no token for it (HF_TOKEN). {reason}"
    elif isinstance(error, LocalEntryNotFoundError):  # a kind of the next one
        reason = f"cannot be reached, and is not in the cache. {reason}"
    elif isinstance(error, EntryNotFoundError):
        reason = f"has no {CONFIG_FILE} and {WEIGHTS_FILE}. {reason}"
    return DownloadError(f"hf://{name}: {reason}")
