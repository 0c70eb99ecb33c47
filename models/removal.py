"""Removes folders that somebody else has filled: however deep they are, and whatever rights are on what is in them."""

import os
import uuid
from contextlib import suppress
from pathlib import Path


def remove(folder: Path) -> None:
    """Remove a folder with all that is in it; what the system does not let go stays.

    Folders inside are brought up to the top one by one, so that neither the depth of the tree nor the length of its
    paths matters. Links are removed, not followed. Nobody else may be at work in the folder.
    """
    stuck: set[str] = set()
    while True:
        try:
            inner = [path for path in _emptied(folder) if path not in stuck]
        except OSError:
            return
        if not inner:
            break
        for path in inner:
            try:
                for below in _emptied(path):
                    os.chmod(below, 0o700)  # a folder without rights cannot be moved
                    os.rename(below, folder / uuid.uuid4().hex)
                os.rmdir(path)
            except OSError:
                stuck.add(path)
    with suppress(OSError):
        folder.rmdir()


def _emptied(folder: str | Path) -> list[str]:
    """Remove all that is no folder; returns the folders that are left."""
    os.chmod(folder, 0o700)
    folders = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                folders.append(entry.path)
            else:
                os.unlink(entry.path)
    return folders
