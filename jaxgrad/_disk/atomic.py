"""Atomic writes: a file or a directory appears complete or not at all.

Each is written under another name beside its own, forced to the disk, and renamed. A directory
disappears the same way: it is renamed before it is deleted. So a kill at any moment leaves nothing
incomplete under the name that readers look for, only a temporary name, which starts with a dot.
"""

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A new file that takes the place of `path` once it is complete and on the disk."""
    new = unfinished(path)
    try:
        with synced(new) as file:
            yield file
        os.replace(new, path)
    except OSError as e:
        if str(e.filename) == str(new):  # a name that means nothing to the caller
            raise type(e)(e.errno, e.strerror, str(path)) from e
        raise
    finally:
        new.unlink(missing_ok=True)
    sync_names(path.parent)


@contextlib.contextmanager
def replacing_directory(path: Path, new: Path) -> Iterator[None]:
    """Gives the directory `new`, made within the context, the name `path` once it is complete.

    Args:
        path: the name. What has it already is deleted, but only after `new` has taken it.
        new: the name to write under, from `unfinished`. It is deleted if anything fails.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    old = _aside(path)
    try:
        yield
        sync_names(new)
        if path.exists():
            path.rename(old)
        try:
            new.rename(path)
        except OSError:
            if old.exists():
                old.rename(path)
            raise
    finally:
        shutil.rmtree(new, ignore_errors=True)
    sync_names(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove_directory(path: Path) -> None:
    """Deletes a directory so that no part of it is ever left under its name."""
    old = _aside(path)
    path.rename(old)
    shutil.rmtree(old, ignore_errors=True)


def unfinished(path: Path, token: str | None = None) -> Path:
    """A temporary name beside `path`; processes that write it together pass the same token."""
    return path.with_name(f".{path.name}.new-{token or secrets.token_hex(4)}")


@contextlib.contextmanager
def synced(path: Path) -> Iterator[IO[bytes]]:
    """A new file that is on the disk when it is closed."""
    with open(path, "xb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def sync_names(directory: Path) -> None:
    """Forces the names in a directory to the disk: a rename changes them, and not the file."""
    if os.name == "posix":
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.old-{secrets.token_hex(4)}")
