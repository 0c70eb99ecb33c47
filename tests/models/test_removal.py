"""Removing what somebody else has filled."""

import os
from pathlib import Path

import pytest

from models.removal import remove


def test_a_tree_of_any_depth_goes(tmp_path: Path) -> None:
    """Deeper than Python recurses, with paths longer than the system takes."""
    top = tmp_path / "top"
    top.mkdir()
    place = os.open(top, os.O_RDONLY)
    for _ in range(3000):
        os.mkdir("inner", dir_fd=place)
        inner = os.open("inner", os.O_RDONLY, dir_fd=place)
        os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=inner))
        os.close(place)
        place = inner
    os.close(place)
    remove(top)
    assert list(tmp_path.iterdir()) == []


def test_links_are_removed_and_not_followed(tmp_path: Path) -> None:
    kept, top = tmp_path / "kept", tmp_path / "top"
    for folder in (kept, top, top / "inner"):
        folder.mkdir()
    (kept / "file").write_text("mine")
    (top / "folder").symlink_to(kept)
    (top / "inner" / "file").symlink_to(kept / "file")
    os.mkfifo(top / "pipe")
    remove(top)
    assert (kept / "file").read_text() == "mine"
    assert list(tmp_path.iterdir()) == [kept]


@pytest.mark.parametrize("rights", [0o000, 0o200, 0o400, 0o500])
def test_rights_do_not_keep_it(tmp_path: Path, rights: int) -> None:
    inner = tmp_path / "top" / "inner" / "innermost"
    inner.mkdir(parents=True)
    (inner / "file").touch()
    inner.chmod(rights)
    inner.parent.chmod(rights)
    remove(tmp_path / "top")
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_there_is_no_error(tmp_path: Path) -> None:
    remove(tmp_path / "nobody")
