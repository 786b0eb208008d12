"""The error for a file that cannot be read.

A checkpoint is foreign data: whatever is wrong with it, the caller sees exactly one exception
type. The parsers know the reason but not the file, so they raise `MalformedError`; the code that
opened the file or entry adds its name with `naming`.
"""

import contextlib
import os
from collections.abc import Iterator

from jaxgrad._disk.malformed import MalformedError


class TorchFileError(ValueError):
    """A file that is not a readable PyTorch checkpoint, with the entry at fault and the reason.

    Args:
        path: the file.
        entry: the part at fault: a zip entry, a tensor's name, or "" for the whole file.
        reason: what is wrong and, if possible, what to do.

    Attributes:
        path: as passed.
        entry: as passed.
        reason: as passed.

    Example:
        >>> raise TorchFileError("net.pt", "archive/data.pkl", "the pickle ends early")
        Traceback (most recent call last):
            ...
        jaxgrad.torch.TorchFileError: net.pt: archive/data.pkl: the pickle ends early
    """

    __module__ = "jaxgrad.torch"

    def __init__(self, path: str | os.PathLike[str], entry: str, reason: str):
        self.path = os.fspath(path)
        self.entry = entry
        self.reason = reason
        super().__init__(self.path, entry, reason)

    def __str__(self) -> str:
        return ": ".join(part for part in (self.path, self.entry, self.reason) if part)


@contextlib.contextmanager
def naming(path: str | os.PathLike[str], entry: str = "") -> Iterator[None]:
    """Turns a `MalformedError` inside into a `TorchFileError` about `entry` of `path`."""
    try:
        yield
    except MalformedError as error:
        raise TorchFileError(path, error.entry or entry, error.reason) from None
