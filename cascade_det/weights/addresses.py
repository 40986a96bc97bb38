"""Resolves names of weights, local or on the web, to local files."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

from cascade_det.backbones.torchvision_weights import torchvision_address
from cascade_det.errors import CheckpointError, DownloadError
from cascade_det.weights.downloads import download

SUFFIXES = (".pth", ".pt", ".pkl", ".safetensors")

_DETECTRON2 = "https://dl.fbaipublicfiles.com/detectron2/"
# torchvision's naming of files, which others adopted. Eight digits may also be a date.
_HASH_IN_NAME = re.compile(r"-(?!(?:19|20)\d\d[01]\d[0-3]\d\.)([0-9a-f]{8,64})\.\w+$")


def local_path(name: str | Path) -> Path:
    """The local file of a name of weights, downloaded once if necessary.

    A name is a path; an ``http://`` or ``https://`` address, whose SHA-256 may follow as
    ``#sha256=<digits>``; ``detectron2://`` and a path below dl.fbaipublicfiles.com/detectron2; or
    ``torchvision://`` and a name for ``torchvision.models.get_weight``, such as
    ``ResNet50_Weights.IMAGENET1K_V2``. The digits in a file name like ``resnet50-11ad3fa6.pth``
    are checked as the start of its SHA-256.

    Downloads go to ``$FVCORE_CACHE``, by default ``~/.torch/iopath_cache``: Detectron2's cache,
    with the same layout for its files, so that they are not fetched twice. Of several processes on
    a machine one downloads.

    Raises:
        CheckpointError: there is no such file, or it cannot be fetched.
    """
    text = str(name)
    if "://" not in text:
        file = Path(os.path.expanduser(text))
        if not os.path.isfile(file):
            raise CheckpointError(f"{file}: no such file of weights. Check MODEL.WEIGHTS.")
        return file
    try:
        address, fragment = urldefrag(_web_address(text))
        path = _cached_path(address)
        sha256 = _known_sha256(path.name, fragment)
    except ValueError as error:
        raise CheckpointError(f"{text}: {error}. Check MODEL.WEIGHTS.") from error
    try:
        download(address, path, sha256=sha256)
    except DownloadError as error:
        raise CheckpointError(
            f"{error}. If it cannot be fetched from here, bring the file by other means and set "
            f"MODEL.WEIGHTS to its path, or put it at {path}."
        ) from error
    return path


def _web_address(name: str) -> str:
    scheme, _, rest = name.partition("://")
    if scheme.lower() in ("http", "https"):
        return name
    if scheme == "detectron2":
        return _DETECTRON2 + rest
    if scheme == "torchvision":
        return torchvision_address(rest)
    raise ValueError(
        f"{scheme}:// is not known; weights are a path, or begin with http://, https://, "
        "detectron2:// or torchvision://"
    )


def _cached_path(address: str) -> Path:
    """The place of a download: its host and path below the cache folder."""
    parts = urlsplit(address)
    host = parts.netloc.rpartition("@")[2]
    names = [host, *(name for name in unquote(parts.path).split("/") if name)]
    if any(name in ("", ".", "..") or "\0" in name for name in names):
        raise ValueError("is not the address of a file")
    if Path(names[-1]).suffix.lower() not in SUFFIXES:
        raise ValueError(
            f"is not the address of a file of weights, which ends in {', '.join(SUFFIXES)}"
        )
    if parts.query:
        names.insert(-1, hashlib.sha256(parts.query.encode()).hexdigest()[:16])
    if address.startswith(_DETECTRON2):
        names.remove(host)
    folder = os.environ.get("FVCORE_CACHE") or "~/.torch/iopath_cache"
    return Path(os.path.expanduser(folder), *names)


def _known_sha256(file_name: str, fragment: str) -> str:
    """The first digits of the checksum, if the address has any; else empty."""
    if not fragment:
        found = _HASH_IN_NAME.search(file_name)
    elif not (found := re.fullmatch("sha256=([0-9a-fA-F]{8,64})", fragment)):
        raise ValueError(f"after # comes sha256= and 8 to 64 hexadecimal digits, not {fragment!r}")
    return found[1].lower() if found else ""
