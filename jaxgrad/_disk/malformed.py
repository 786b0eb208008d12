"""What is wrong with a file, said where neither its name nor its reader's error type is known.

A file is data from elsewhere. The layers that parse one know the reason but not where they are, so
they raise `MalformedError`; whoever opened the file adds its name.
"""

from typing import Any

MAX_INT64 = 2**63 - 1


class MalformedError(Exception):
    """A reason, and the entry of the file that it concerns, where that is known."""

    def __init__(self, reason: str, entry: str = ""):
        self.reason = reason
        self.entry = entry
        super().__init__(reason)


def checked_int(value: Any, what: str) -> int:
    """`value`, when it is an integer in [0, 2**63)."""
    if type(value) is int and 0 <= value <= MAX_INT64:
        return value
    shown = value if type(value) is int else f"a {type(value).__name__}"
    raise MalformedError(f"{what} is {shown}, expected an integer in [0, 2**63)")


def shorten(text: str, limit: int = 80) -> str:
    """`text` as it may be shown in a message: printable, and never longer than `limit`."""
    shown = text if len(text) <= limit else f"{text[: limit - 3]}..."
    return ascii(shown)[1:-1]
