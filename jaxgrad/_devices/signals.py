"""Turns SIGINT and SIGTERM into a value to check between steps, not an exception within one."""

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from jaxgrad._devices.processes import greatest


class Interrupted(KeyboardInterrupt):
    """A signal ended a training run after saving it; the message says how to resume.

    Attributes:
        state: the `TrainState` that was saved.
        signal: the signal that arrived.
    """

    __module__ = "jaxgrad"

    def __init__(self, message: str, state: Any, signal: signal.Signals) -> None:
        super().__init__(message)
        self.state = state
        self.signal = signal


def agreed(caught: list[signal.Signals]) -> signal.Signals | None:
    """The signal that any process received, so that all end at the same step."""
    number = greatest(caught[0] if caught else 0)
    return signal.Signals(number) if number else None


@contextlib.contextmanager
def caught_signals(active: bool) -> Iterator[list[signal.Signals]]:
    """Yields a list, empty until one of the two signals arrives; a second one kills at once."""
    caught: list[signal.Signals] = []
    # Python lets only the main thread set handlers.
    if not active or threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def catch(number: int, frame: FrameType | None) -> None:
        caught.append(signal.Signals(number))
        for each in before:
            signal.signal(each, signal.SIG_DFL)
        name = caught[0].name
        print(f"{name}: finishing the step and saving; again to leave at once", file=sys.stderr)

    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    for each in before:
        signal.signal(each, catch)
    try:
        yield caught
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
