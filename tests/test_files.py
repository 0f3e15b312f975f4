"""Files are whole or not there, and the disk holds them before they are seen."""

import os

import pytest

from fmnlib import InputError
from fmnlib.files import new_part, open_regular, write_whole


def names(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_write_whole_leaves_no_part(tmp_path):
    write_whole(tmp_path / "a" / "b", b"old")
    write_whole(tmp_path / "a" / "b", b"new")
    assert (tmp_path / "a" / "b").read_bytes() == b"new"
    with pytest.raises(OSError, match="directory"):
        write_whole(tmp_path / "a", b"new")  # a folder is in the place of the file
    assert names(tmp_path) == ["b"]


def test_the_disk_holds_a_file_before_it_is_seen(tmp_path, monkeypatch):
    order, hold, put = [], os.fsync, type(tmp_path).replace
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append("held"), hold(fd)))
    monkeypatch.setattr(
        type(tmp_path), "replace", lambda part, path: (order.append(path.name), put(part, path))
    )
    write_whole(tmp_path / "state", b"new")
    assert order == ["held", "state"]


def test_what_cannot_be_written_leaves_no_part(tmp_path, monkeypatch):
    (tmp_path / "rows").write_bytes(b"row")
    with pytest.raises(FileExistsError):
        write_whole(tmp_path / "rows" / "state", b"")  # its folder is a file
    monkeypatch.setattr(os, "fsync", lambda fd: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_whole(tmp_path / "rows", b"new")
    assert names(tmp_path) == ["rows"]
    assert (tmp_path / "rows").read_bytes() == b"row"


def test_a_pipe_or_a_device_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "page.html")
    with pytest.raises(InputError, match="is a pipe or a device; give the name of a file"):
        write_whole(tmp_path / "page.html", b"new")
    with pytest.raises(OSError, match="is not a regular file"):
        open_regular(tmp_path / "page.html")  # and does not wait for a writer
    assert (tmp_path / "page.html").is_fifo()


def test_no_link_is_followed(tmp_path, monkeypatch):
    precious = tmp_path / "precious"
    precious.write_bytes(b"old")
    (tmp_path / "a").symlink_to(precious)
    for name in (f".a.{os.getpid()}.part", ".a.known.part"):
        (tmp_path / name).symlink_to(precious)
    write_whole(tmp_path / "a", b"new")  # takes the place of the link
    assert precious.read_bytes() == b"old"
    assert (tmp_path / "a").read_bytes() == b"new"
    monkeypatch.setattr("secrets.token_hex", lambda size: "known")  # should one guess right
    with pytest.raises(FileExistsError):
        write_whole(tmp_path / "a", b"newer")
    assert precious.read_bytes() == b"old"
    (tmp_path / "b").symlink_to(precious)
    with pytest.raises(OSError, match="symbolic link"):
        open_regular(tmp_path / "b", "ab")


def test_parts_have_names_that_nobody_knows(tmp_path):
    assert new_part(tmp_path / "a") != new_part(tmp_path / "a")
