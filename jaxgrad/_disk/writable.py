"""Whether something can be written, asked before hours of work or another library's threads."""

import os
import tempfile
from pathlib import Path


def refuse_unwritable(path: Path) -> None:
    """Raises if no file or directory can be made at a path; folders above it may be missing.

    A file is made and deleted in the nearest folder that exists, because no permission bit tells
    whether that works: root may write where the bits forbid it, but not in /proc.

    Raises:
        OSError: it can't; the message names the path, the folder and the cause.
    """
    path = path.absolute()
    folder = next(parent for parent in path.parents if os.path.lexists(parent))
    if not folder.is_dir():
        raise NotADirectoryError(f"'{path}' can't be written: '{folder}' is not a directory.")
    if path.is_file() and not os.access(path, os.W_OK):
        raise PermissionError(f"'{path}' can't be written: the file is read-only.")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as e:
        raise type(e)(f"'{path}' can't be written: '{folder}' takes no file ({e.strerror}).") from e
