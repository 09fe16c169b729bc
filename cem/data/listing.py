"""What lies in folders of images, without what nobody put there to be seen."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from cem.data.decode import SUFFIXES
from cem.errors import DataError

# Left by Windows, macOS, file systems and storage servers, the last with small copies of all images.
_JUNK = ("__MACOSX", "Thumbs.db", "desktop.ini", "$RECYCLE.BIN", "System Volume Information", "lost+found", "@eaDir")


class Listing:
    """Reads every folder once.

    Attributes:
        left_out: how many hidden entries and files that are no images there were, by a phrase for each kind.
    """

    def __init__(self) -> None:
        self.left_out: Counter[str] = Counter()
        self._read: dict[str, tuple[list[str], list[str]]] = {}

    def folders(self, path: Path) -> tuple[str, ...]:
        """Names of the folders in ``path``, in order; none if it is no folder.

        Raises:
            DataError: it cannot be read.
        """
        return tuple(self._entries(str(path))[0]) if path.is_dir() else ()

    def outside(self, path: Path) -> list[str]:
        """Images in ``path`` that lie in none of its folders; other files there are counted as left out."""
        return self._images(str(path), self._entries(str(path))[1])

    def images(self, path: str, above: tuple[str, ...] = ()) -> list[str]:
        """Images below ``path``, at any depth, sorted by folder, then by name.

        Raises:
            DataError: a folder cannot be read, or is a link to one that it lies in.
        """
        real = os.path.realpath(path)
        if real in above:
            raise DataError(f"{path} leads back to {real}, in which it lies, by a link; remove the link")
        folders, files = self._entries(path)
        found = [self._images(path, files)]
        found += [self.images(os.path.join(path, name), (*above, real)) for name in folders]
        return sorted((image for each in found for image in each), key=os.path.split)

    def _images(self, path: str, names: list[str]) -> list[str]:
        suffixes = {name: os.path.splitext(name)[1].lower() for name in names}
        others = (suffix for suffix in suffixes.values() if suffix not in SUFFIXES)
        self.left_out.update(suffix or "without a suffix" for suffix in others)
        return [os.path.join(path, name) for name, suffix in suffixes.items() if suffix in SUFFIXES]

    def _entries(self, path: str) -> tuple[list[str], list[str]]:
        """Names of folders and of files in ``path``, sorted, that are not hidden."""
        if path not in self._read:
            try:
                with os.scandir(path) as entries:
                    seen = sorted((entry.name, _is_folder(entry)) for entry in entries)
            except OSError as error:
                raise DataError(f"{path} cannot be read: {error.strerror}") from error
            shown = [(name, is_folder) for name, is_folder in seen if name[0] != "." and name not in _JUNK]
            self.left_out.update(["hidden"] * (len(seen) - len(shown)))
            self._read[path] = (
                [name for name, is_folder in shown if is_folder],
                [name for name, is_folder in shown if not is_folder],
            )
        return self._read[path]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, which whoever reads it will find out
        return False
