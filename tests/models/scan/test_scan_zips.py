"""Archives that two readers could see differently, or that unpack to anything, are refused."""

import io
import struct
import zipfile
from pathlib import Path

import pytest

from fusion.errors import BadFile, ClearfoldError, UnsafeFile
from models.scan.zips import contents

CODE = b"def forward(self):\n  pass\n" * 10


def archive(path: Path, entries: dict[str, bytes], compressed: tuple[str, ...] = ()) -> Path:
    with zipfile.ZipFile(path, "w") as out:
        for name, data in entries.items():
            kind = zipfile.ZIP_DEFLATED if name in compressed else zipfile.ZIP_STORED
            out.writestr(zipfile.ZipInfo(name), data, kind)
    return path


def names(path: Path) -> set[str]:
    return set(contents(path, path.name, lambda name: name.startswith("code/")).entries)


def test_an_ordinary_archive_passes(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.pt", {"a/data.pkl": b"x", "a/code/b.py": CODE}, ("a/code/b.py",))
    found = contents(path, path.name, lambda name: name.startswith("code/"))
    assert set(found.entries) == {"data.pkl", "code/b.py"}
    assert found.read("code/b.py") == CODE
    assert found.named(lambda name: name.endswith(".pkl")) == ["data.pkl"]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"a/../b": b""}, "path"),
        ({"/a/b": b""}, "path"),
        ({"a/b\\c": b""}, "path"),
        ({"a/data.pkl": b"", "a/DATA.pkl": b"1"}, "twice"),
        ({"a/data.pkl": b"", "b/data.pkl": b"1"}, "twice|top folder"),
        ({"a/data.pkl": b"", "b/other.pkl": b"1"}, "top folder"),
    ],
)
def test_odd_names_are_refused(entries: dict[str, bytes], message: str, tmp_path: Path) -> None:
    with pytest.raises(UnsafeFile, match=message):
        names(archive(tmp_path / "a.pt", entries))


def test_compressed_weights_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsafeFile, match="compressed weights"):
        names(archive(tmp_path / "a.pt", {"a/data/0": bytes(1000)}, ("a/data/0",)))


def test_a_bomb_is_refused_by_its_ratio_and_by_its_size(tmp_path: Path) -> None:
    one = {"a/code/b.py": b" " * (8 << 20)}
    with pytest.raises(UnsafeFile, match="unpack"):
        names(archive(tmp_path / "a.pt", one, ("a/code/b.py",)))
    sizes = {f"a/code/{i}.py": bytes(2 << 20) for i in range(2)}
    with zipfile.ZipFile(tmp_path / "b.pt", "w") as out:
        for name, data in sizes.items():
            out.writestr(zipfile.ZipInfo(name), data)
        for info in out.filelist:  # what the directory says; nobody has unpacked it yet
            info.compress_type, info.file_size = zipfile.ZIP_DEFLATED, 200 << 20
    with pytest.raises(UnsafeFile, match="400 MiB of code"):
        names(tmp_path / "b.pt")


def test_many_entries_are_refused_before_their_list_is_read(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.pt", {"a/b": b"", "a/c": b""})
    data = path.read_bytes()
    start, length = struct.unpack("<2L", data[-10:-2])[::-1]
    record = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, 200_000, 200_000, length, start)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, len(data) - 22, 1)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, length, start, 0)
    path.write_bytes(data[:-22] + record + locator + end)
    with pytest.raises(UnsafeFile, match="200000 entries"):
        names(path)


def changed(path: Path, change: object) -> Path:
    data = bytearray(path.read_bytes())
    assert callable(change)
    path.write_bytes(bytes(change(data)))
    return path


def _other_name(data: bytearray) -> bytearray:
    data[30 : 30 + 3] = b"a/x"  # in the first local header only
    return data


def _prefix(data: bytearray) -> bytearray:
    return bytearray(b"#!/bin/sh\n") + data


def _comment(data: bytearray) -> bytearray:
    data[-2:] = struct.pack("<H", 4)
    return data + b"more"


def _tail(data: bytearray) -> bytearray:
    return data + b"more"


def _second_archive(data: bytearray) -> bytearray:
    other = io.BytesIO()
    with zipfile.ZipFile(other, "w") as out:
        out.writestr("a/data.pkl", b"harmless")
    return data + other.getvalue()


def _same_place(data: bytearray) -> bytearray:
    """The second entry of the directory lies where the first does."""
    start = struct.unpack("<L", data[-6:-2])[0]
    second = data.index(b"PK\x01\x02", start + 4)
    data[second + 42 : second + 46] = bytes(4)
    return data


def _encrypted(data: bytearray) -> bytearray:
    start = struct.unpack("<L", data[-6:-2])[0]
    data[start + 8] |= 1
    return data


def _sizes(data: bytearray) -> bytearray:
    start = struct.unpack("<L", data[-6:-2])[0]
    data[start + 24 : start + 28] = struct.pack("<L", 1 << 30)
    return data


@pytest.mark.parametrize(
    "change",
    [_other_name, _prefix, _comment, _tail, _second_archive, _same_place, _encrypted, _sizes],
)
def test_what_readers_could_disagree_on_is_refused(change: object, tmp_path: Path) -> None:
    path = archive(tmp_path / "a.pt", {"a/b": b"12345678", "a/c": b"abcdefgh"})
    assert names(path) == {"b", "c"}
    with pytest.raises((BadFile, UnsafeFile)):
        names(changed(path, change))


def test_no_cut_is_taken_for_a_whole_archive(tmp_path: Path) -> None:
    data = archive(tmp_path / "a.pt", {"a/b": b"12345678", "a/code/c.py": CODE}).read_bytes()
    for end in range(0, len(data), 3):
        (tmp_path / "cut.pt").write_bytes(data[:end])
        with pytest.raises(ClearfoldError):
            names(tmp_path / "cut.pt")


def test_a_damaged_entry_is_a_bad_file(tmp_path: Path) -> None:
    path = archive(tmp_path / "a.pt", {"a/b": b"12345678"})
    changed(path, lambda data: data.replace(b"12345678", b"12345679"))
    with pytest.raises(BadFile, match="damaged"):
        contents(path, path.name, lambda name: True).read("b")
