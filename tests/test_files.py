"""Files are whole or not there, in the order in which they were given."""

import os

import pytest

from fmnlib import InputError
from fmnlib.files import Transaction, new_part, open_regular, write_whole


def names(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_write_whole_leaves_no_part(tmp_path):
    write_whole(tmp_path / "a" / "b", b"old")
    write_whole(tmp_path / "a" / "b", b"new")
    assert (tmp_path / "a" / "b").read_bytes() == b"new"
    with pytest.raises(OSError, match="directory"):
        write_whole(tmp_path / "a", b"new")  # a folder is in the place of the file
    assert names(tmp_path) == ["b"]


def test_nothing_is_in_its_place_before_the_batch_is_commitd(tmp_path):
    (tmp_path / "one").write_bytes(b"old")
    batch = Transaction()
    batch.write(tmp_path / "one", b"new")
    batch.write(tmp_path / "two", b"new")
    assert (tmp_path / "one").read_bytes() == b"old"
    assert not (tmp_path / "two").exists()
    batch.commit()
    assert {(tmp_path / name).read_bytes() for name in names(tmp_path)} == {b"new"}


def test_a_file_is_not_seen_before_those_given_before_it(tmp_path, monkeypatch):
    order, sync, put = [], os.fsync, type(tmp_path).replace
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append("held"), sync(fd)))
    monkeypatch.setattr(
        type(tmp_path), "replace", lambda part, path: (order.append(path.name), put(part, path))
    )
    (tmp_path / "rows").write_bytes(b"row")
    batch = Transaction()
    batch.changed(tmp_path / "rows")
    batch.write(tmp_path / "weights", b"")
    batch.write(tmp_path / "state", b"")
    batch.commit()
    assert order == ["held", "held", "weights", "held", "state"]


def test_where_one_cannot_be_written_none_is(tmp_path):
    (tmp_path / "rows").write_bytes(b"row")
    batch = Transaction()
    batch.changed(tmp_path / "rows")
    batch.write(tmp_path / "weights", b"new")
    with pytest.raises(FileExistsError):
        batch.write(tmp_path / "rows" / "state", b"")  # its folder is a file
    batch.commit()
    assert names(tmp_path) == ["rows"]


def test_where_one_cannot_be_put_in_its_place_those_after_it_are_not(tmp_path):
    (tmp_path / "weights").mkdir()
    batch = Transaction()
    batch.write(tmp_path / "weights", b"new")
    batch.write(tmp_path / "state", b"new")
    with pytest.raises(OSError, match="directory"):
        batch.commit()
    assert names(tmp_path) == []


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
