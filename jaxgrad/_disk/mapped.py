"""A file as a read-only memory map."""

import mmap
import os
import stat
from os import PathLike

from jaxgrad._disk.malformed import MalformedError


def mapped(path: str | PathLike[str]) -> mmap.mmap:
    """Maps a regular file.

    Raises:
        MalformedError: the file is empty, or a pipe or device.
        OSError: as `open` raises it.
    """
    with open(path, "rb", opener=_open_regular) as file:
        try:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise MalformedError("the file is empty") from None


def _open_regular(path: str, flags: int) -> int:
    # A pipe would block until somebody writes to it.
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise MalformedError("not a regular file")
    return os.open(path, flags)
