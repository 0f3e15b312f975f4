"""Files are whole or not there, in the order in which they were given."""

import os

import pytest

from fmnlib.files import Transaction, write_whole


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
