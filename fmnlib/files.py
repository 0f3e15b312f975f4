"""Files that are written whole or not at all, what is read as a file, and where data sets lie."""

import os
import secrets
import stat
from pathlib import Path
from typing import IO

from fmnlib.config import InputError


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Write a file whole or not at all: a reader sees the old file or the new one, never half."""
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
    """Wait until the disk holds what was written into a file."""
    with path.open("r+b") as file:
        os.fsync(file.fileno())


def new_part(path: Path) -> Path:
    """A new, empty file beside a path, by a name that nobody can have planted a link under."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    part.open("xb").close()
    return part


def open_regular(path: Path, mode: str = "rb") -> IO[bytes]:
    """Open a file; an `OSError` for a link, and for what would hang, such as a pipe."""
    safely = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0)  # not on Windows
    file = open(path, mode, opener=lambda name, flags: os.open(name, flags | safely, 0o666))
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(f"{path} is not a regular file")
    return file


def require_file(path: Path) -> None:
    """An `OSError` for what is not a file: to open a pipe would hang."""
    if not path.is_file():
        raise OSError("it is not a file")


def refuse_existing(path: Path) -> None:
    """An `InputError` for a path at which something would be overwritten."""
    if path.exists():
        raise InputError(f"{path} exists; give another name, or move it away")


def data_root() -> Path:
    """Where data sets lie: the folder that the environment variable FMN_DATA names, or data/."""
    return Path(os.environ.get("FMN_DATA", "data"))
