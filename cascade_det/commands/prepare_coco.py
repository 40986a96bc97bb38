"""Download COCO 2017 and unpack it where the configurations look for it.

cascade-det prepare-coco --splits val

After an interruption, run it again: it continues, and keeps what is there. The training images
take 19 GB, and as much again until their archive is unpacked.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import stat
import sys
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from zipfile import ZipFile, ZipInfo

from cascade_det.commands.arguments import command_parser
from cascade_det.commands.errors import without_traceback
from cascade_det.errors import CascadeDetError, DatasetError

SPLITS = ["train", "val"]
BASE_URL = "http://images.cocodataset.org"


def _parse(argv: Sequence[str] | None, prog: str | None) -> argparse.Namespace:
    parser = command_parser(prog, __doc__)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(os.environ.get("DETECTRON2_DATASETS", "datasets")),
        help="folder of data sets, which gets coco/ ($DETECTRON2_DATASETS or datasets)",
    )
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=SPLITS)
    parser.add_argument("--base-url", default=BASE_URL, help=f"of a mirror ({BASE_URL})")
    parser.add_argument("--keep-archives", action="store_true", help="keep zip files when unpacked")
    return parser.parse_args(argv)


@dataclass(frozen=True)
class Archive:
    """One of COCO's zip files.

    Attributes:
        path: on the server.
        size: bytes.
        sha256: of the file.
        unpacked: bytes unpacked from it, roughly; twice as many are refused.
    """

    path: str
    size: int
    sha256: str
    unpacked: int


ANNOTATIONS = Archive(
    "annotations/annotations_trainval2017.zip",
    252_907_541,
    "113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268",
    500_000_000,
)
IMAGES = {
    "train": Archive(
        "zips/train2017.zip",
        19_336_861_798,
        "69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929",
        19_400_000_000,
    ),
    "val": Archive(
        "zips/val2017.zip",
        815_585_330,
        "4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05",
        820_000_000,
    ),
}
COUNTS = {"train": 118_287, "val": 5_000}  # images


@without_traceback
def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run the command; returns its exit status."""
    args = _parse(argv, prog)
    try:
        prepare_coco(
            args.output, args.splits, base_url=args.base_url, keep_archives=args.keep_archives
        )
    except KeyboardInterrupt:
        print("Interrupted. Run the same command again to continue.", file=sys.stderr)
        raise
    print(f"{args.output / 'coco'}: {' and '.join(args.splits)} complete")
    return 0


def prepare_coco(
    output: str | Path,
    splits: Iterable[str] = ("val", "train"),
    *,
    base_url: str = BASE_URL,
    keep_archives: bool = False,
) -> None:
    """Make ``coco/annotations``, ``coco/train2017`` and ``coco/val2017`` in ``output``.

    Only ``instances_*.json`` of the annotations are unpacked. An archive that is already in
    ``coco`` is not downloaded again.

    Args:
        output: the folder of data sets.
        splits: ``"train"``, ``"val"`` or both.
        base_url: of a server with COCO's folders ``zips`` and ``annotations``.
        keep_archives: keep the zip files after unpacking.

    Raises:
        DownloadError: an archive cannot be downloaded, or an existing one has another checksum.
        DatasetError: the disk is too full, or an archive is damaged, unsafe or incomplete.
    """
    from cascade_det.weights.downloads import download

    folder = Path(output, "coco")
    splits = sorted(set(splits), key=COUNTS.__getitem__)
    annotations = [f"annotations/instances_{split}2017.json" for split in splits]
    work: list[tuple[Archive, str]] = []  # and a pattern of the files to unpack
    if not all((folder / name).is_file() for name in annotations):
        work.append((ANNOTATIONS, "|".join(re.escape(name) for name in annotations)))
    for split in splits:
        if _count(folder / f"{split}2017") < COUNTS[split]:
            work.append((IMAGES[split], rf"{split}2017/[^/]+\.jpg"))
    _check_room(folder, [archive for archive, _ in work])
    for archive, wanted in work:
        path = folder / PurePosixPath(archive.path).name
        download(f"{base_url.rstrip('/')}/{archive.path}", path, sha256=archive.sha256)
        unpack(path, folder, wanted, limit=2 * archive.unpacked)
        if not keep_archives:
            path.unlink()
            Path(f"{path}.lock").unlink(missing_ok=True)
    for split in splits:
        _check_split(folder, split)


def unpack(path: Path, folder: Path, wanted: str, *, limit: int) -> None:
    """Unpack the missing files of a zip file, and never outside ``folder``.

    Files appear whole, with the archive's checksum. Existing files are kept if they have it, and
    replaced if not.

    Args:
        path: the zip file.
        folder: its names are relative to this.
        wanted: a regular expression that matches the whole names of the files to unpack.
        limit: most bytes of these files together.

    Raises:
        DatasetError: names the archive and the fault. Absolute names, ``..``, links and more than
            ``limit`` bytes are refused before anything is unpacked.
    """
    from tqdm import tqdm

    from cascade_det.files import remove_leftovers

    try:
        with ZipFile(path) as archive:
            members = _safe_members(archive, path)
            members = [member for member in members if re.fullmatch(wanted, member.filename)]
            for place in {(folder / member.filename).parent for member in members}:
                remove_leftovers(place)
            if (total := sum(member.file_size for member in members)) > limit:
                raise DatasetError(f"{path}: would unpack to {total:,} bytes, over {limit:,}")
            for member in tqdm(members, desc=f"unpacking {path.name}", disable=None):
                if not _is_unpacked(member, folder):
                    _unpack_member(archive, member, folder)
    except CascadeDetError:
        raise
    except OSError as error:
        raise DatasetError(f"{path}: cannot be unpacked into {folder} ({error})") from error
    # Damaged archives raise errors of many kinds.
    except Exception as error:
        raise DatasetError(
            f"{path}: is not a complete zip file ({error}). Delete it and run this again."
        ) from error


def _safe_members(archive: ZipFile, path: Path) -> list[ZipInfo]:
    for member in archive.infolist():
        name = PurePosixPath(member.filename)
        if name.is_absolute() or ".." in name.parts or "\\" in member.filename:
            raise DatasetError(f"{path}: refused, it would write to {member.filename}")
        if stat.S_ISLNK(member.external_attr >> 16):
            raise DatasetError(f"{path}: refused, its {member.filename} is a link")
    return [member for member in archive.infolist() if not member.is_dir()]


def _is_unpacked(member: ZipInfo, folder: Path) -> bool:
    target = folder / member.filename
    if not target.is_file() or target.stat().st_size != member.file_size:
        return False
    checksum = 0
    with target.open("rb") as file:
        while block := file.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
    return checksum == member.CRC


def _unpack_member(archive: ZipFile, member: ZipInfo, folder: Path) -> None:
    from cascade_det.files import atomic_path

    # Waiting for the disk at each of 100,000 files takes long. The checksum finds files that a
    # crash of the machine damaged.
    with (
        atomic_path(folder / member.filename, durable=False) as temporary,
        archive.open(member) as source,
        temporary.open("wb") as file,
    ):
        shutil.copyfileobj(source, file, 1 << 20)


def _check_room(folder: Path, archives: Iterable[Archive]) -> None:
    """Raise DatasetError unless the disk has room for what is missing."""
    needed = 0
    for archive in archives:
        path = folder / PurePosixPath(archive.path).name
        here = max(_size(path), _size(Path(f"{path}.part")))
        unpacked = sum(_size(file) for file in (folder / path.stem).glob("*.jpg"))
        needed += max(0, archive.size - here) + max(0, archive.unpacked - unpacked)
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise DatasetError(
            f"{folder}: {needed / 1e9:.1f} GB are needed for archives and their content, and "
            f"{free / 1e9:.1f} GB are free. Give another --output, or fewer --splits."
        )


def _check_split(folder: Path, split: str) -> None:
    """Raise DatasetError unless all annotations and images are there."""
    path = folder / "annotations" / f"instances_{split}2017.json"
    try:
        names = [str(image["file_name"]) for image in json.loads(path.read_bytes())["images"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DatasetError(
            f"{path}: cannot be read ({error}). Delete it and run this again."
        ) from error
    if len(names) != COUNTS[split]:
        raise DatasetError(
            f"{path}: has {len(names):,} images, and COCO's has {COUNTS[split]:,}. Move it away "
            "and run this again."
        )
    images = folder / f"{split}2017"
    missing = sorted(set(names) - set(os.listdir(images)))
    if missing:
        raise DatasetError(
            f"{images}: lacks {len(missing):,} images, {missing[0]} among them, and has others "
            "instead. Give another --output, or move the folder away."
        )


def _count(folder: Path) -> int:
    return sum(1 for _ in folder.glob("*.jpg"))


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
