"""Images as a source of frames: files, addresses, and folders in which they appear."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path

from cascade_det.data.transforms import Pixels, read_image
from cascade_det.data.watched_folder import WatchedFolders
from cascade_det.data.web_images import WebImage
from cascade_det.errors import DatasetError
from cascade_det.streams.frames import BadFrame, Frame, Origin


class ImageSource:
    """Image files and addresses, one after the other.

    Args:
        images: each is a frame.
    """

    live = False

    def __init__(self, images: Sequence[Path | WebImage]) -> None:
        self._images = tuple(images)
        self.origins: Sequence[Origin] = self._images

    @property
    def length(self) -> int:
        """The number of images."""
        return len(self._images)

    def frames(self) -> Generator[Frame | BadFrame, None, None]:
        """Each image, read when it is its turn."""
        for image in self._images:
            try:
                yield Frame(image, _read(image))
            except DatasetError as error:
                yield BadFrame(image, str(error).removeprefix(f"{image}: "))


def _read(image: Path | WebImage) -> Pixels:
    return image.read() if isinstance(image, WebImage) else read_image(str(image), "BGR")


class WatchedSource:
    """Images that appear in folders, without end.

    Args:
        folders: see ``WatchedFolders``.
    """

    live = True
    length = None
    origins: Sequence[Origin] = ()

    def __init__(self, folders: WatchedFolders) -> None:
        self._folders = folders

    def frames(self) -> Generator[Frame | BadFrame | None, None, None]:
        """Each image once; ``None`` after each look."""
        for found in self._folders:
            if found is None:
                yield None
                continue
            path, content = found
            if isinstance(content, DatasetError):
                yield BadFrame(path, str(content).removeprefix(f"{path}: "))
            else:
                yield Frame(path, content)
