"""Atomic writes, opening of regular files only, and the folder of data sets."""

import os
import secrets
import stat
from pathlib import Path
from typing import IO

from fmnlib.config import InputError


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write a file atomically: a reader sees the old file or the new one, never a part of it."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise InputError(f"{path} is a pipe or a device; give the name of a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = new_part(path)
    try:
        part.write_bytes(content)
        sync(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Flush a file to disk (fsync)."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def new_part(path: Path) -> Path:
    """Create an empty file beside a path; its random name rules out a planted link."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    part.open("xb").close()
    return part


def open_regular(path: Path, mode: str = "rb") -> IO[bytes]:
    """Open a regular file; an `OSError` for a link, or for a pipe, which would hang."""
    safely = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0)  # not on Windows
    file = open(path, mode, opener=lambda name, flags: os.open(name, flags | safely, 0o666))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(f"{path} is not a regular file")
    return file


def require_file(path: Path) -> None:
    """Raise `OSError` for anything but a regular file: opening a pipe would hang."""
    if not path.is_file():
        raise OSError("it is not a file")


def refuse_existing(path: Path) -> None:
    """Raise `InputError` if something at this path would be overwritten."""
    if path.exists():
        raise InputError(f"{path} exists; give another name, or move it away")


def data_root() -> Path:
    """Where data sets lie: the folder that the environment variable FMN_DATA names, or data/."""
    return Path(os.environ.get("FMN_DATA", "data"))
