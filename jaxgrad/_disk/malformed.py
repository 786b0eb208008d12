"""Malformed files: the reason, raised where the file's name and its reader's error are unknown.

A file is data from elsewhere. The layers that parse one know the reason but not where they are, so
they raise `MalformedError`; whoever opened the file adds its name.
"""

MAX_INT64 = 2**63 - 1


class MalformedError(Exception):
    """A reason, and the entry of the file that it concerns, if known."""

    def __init__(self, reason: str, entry: str = ""):
        self.reason = reason
        self.entry = entry
        super().__init__(reason)


def checked_int(value: object, what: str) -> int:
    """`value`, if it is an integer in [0, 2**63)."""
    if type(value) is int and 0 <= value <= MAX_INT64:
        return value
    shown = value if type(value) is int else f"a {type(value).__name__}"
    raise MalformedError(f"{what} is {shown}, expected an integer in [0, 2**63)")


def shorten(text: str, limit: int = 80) -> str:
    """`text` for a message: printable, and never longer than `limit`."""
    shown = text if len(text) <= limit else f"{text[: limit - 3]}..."
    return ascii(shown)[1:-1]
