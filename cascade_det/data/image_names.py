"""Which files the file names in a json may refer to."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from cascade_det.data.catalog import DatasetSource
from cascade_det.text import printable

# Lower case, of the formats that are read in every run.
IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
LINK_RULES = ("near", "all", "none")  # the first is the default

# Windows paths: "images\1.png", "C:/images/1.png".
_WINDOWS_PATH = re.compile(r"[A-Za-z]:/|.*\\", re.DOTALL)


@dataclass(frozen=True)
class LinkRule:
    """Which symbolic links out of the image folder are followed.

    A link may be a file, or a folder on the path to it, such as a data cache or another disk.

    Attributes:
        follow: ``"near"``: targets below the folder of the json or the working directory;
            ``"all"``; or ``"none"``.
        option: name of the user's option, for messages.
    """

    follow: str = LINK_RULES[0]
    option: str = "CASCADE.FOLLOW_LINKS"


NEAR_LINKS = LinkRule()
ALL_LINKS = LinkRule("all")


def is_windows_path(file_name: str) -> bool:
    """Whether a name is a path in Windows notation, which is a plain file name here."""
    return _WINDOWS_PATH.match(file_name) is not None


def name_guard(source: DatasetSource, links: LinkRule) -> Callable[[str], tuple[str, str] | None]:
    """A check of file names that returns (kind, detail) of an issue, or ``None``.

    A name without ``..`` may leave the image folder through links that ``links`` allows. Others,
    absolute ones included, may not leave it at all.

    Args:
        source: the data set.
        links: which links are followed.
    """
    root = os.path.realpath(source.image_root)
    allowed = [root]
    if links.follow == "near":
        near = (os.path.realpath(source.json_file.parent), os.path.realpath("."))
        # Everything is below the root of the file system.
        allowed += [folder for folder in near if folder != os.path.sep]
    prefixes = tuple(os.path.join(folder, "") for folder in allowed)
    inside = os.path.join(root, "")
    # Many images share few folders, so only the file itself is resolved per image.
    real_folder = cache(os.path.realpath)

    def find_escape(file_name: str) -> tuple[str, str] | None:
        folder, name = os.path.split(os.path.join(root, file_name))
        path = os.path.join(real_folder(folder), name)
        if name in ("", ".", "..") or os.path.islink(path):
            path = os.path.realpath(path)
        if path.startswith(inside):
            return None
        if os.path.isabs(file_name) or ".." in file_name.split("/") or path == root:
            return "image whose 'file_name' leaves the image folder", ""
        if links.follow == "all" or path.startswith(prefixes):
            return None
        remedy = "'all' anywhere"
        if links.follow == "none":
            remedy = (
                f"'near' follows it to the folder of the json and the working directory, {remedy}"
            )
        kind = (
            f"image behind a link out of its folder, which {links.option} {links.follow!r} does "
            f"not follow ({remedy})"
        )
        link = _first_link(source, file_name)
        return kind, f"'{printable(link)}' leads to '{printable(path)}'"

    return find_escape


def _first_link(source: DatasetSource, file_name: str) -> str:
    """The first part of a name that is a link."""
    path = str(source.image_root)
    for part in file_name.split("/"):
        path = os.path.join(path, part)
        if os.path.islink(path):
            break
    return path
