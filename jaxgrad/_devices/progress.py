"""A progress bar on standard error, or in the output of a notebook's cell."""

import contextlib
import io
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeAlias

from jaxgrad._devices.processes import is_first

if TYPE_CHECKING:
    from rich.progress import Progress

Advance: TypeAlias = Callable[[int, str], None]

_REDRAWN = 0.1  # seconds between two drawings in a notebook: each is a message to its page


@contextlib.contextmanager
def progress_bar(
    total: int | None, text: str, show: bool, *, done: int = 0, transient: bool = False
) -> Iterator[Advance]:
    """Shows a progress bar in the first process, on a terminal or in a notebook.

    Args:
        total: the amount of work, or None if it is unknown.
        text: the text beside the bar until the first advance.
        show: False shows nothing.
        done: the work that was done before.
        transient: remove the bar at the end.

    Yields:
        `advance(amount, text)`, which moves the bar and replaces its text.
    """
    from rich.console import Console

    console = Console(stderr=True)
    # rich never calls a notebook a terminal.
    if not (show and is_first() and (console.is_terminal or console.is_jupyter)):
        yield lambda amount, text: None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=transient)
    task = bar.add_task(text, total=total, completed=done)
    with _in_notebook(bar, transient) if console.is_jupyter else _on_terminal(bar) as redraw:

        def advance(amount: int, text: str) -> None:
            bar.update(task, advance=amount, description=text)
            redraw()

        yield advance


@contextlib.contextmanager
def _on_terminal(bar: "Progress") -> Iterator[Callable[[], None]]:
    """On a terminal, where rich draws by itself."""
    with bar:
        yield lambda: None


@contextlib.contextmanager
def _in_notebook(bar: "Progress", transient: bool) -> Iterator[Callable[[], None]]:
    """In the output of a cell, as one line of text that is replaced.

    rich itself needs ipywidgets there, which a saved notebook does not show.
    """
    from IPython.display import DisplayHandle

    handle = DisplayHandle()
    handle.display({"text/plain": _drawn(bar)}, raw=True)
    last = time.monotonic()

    def redraw() -> None:
        nonlocal last
        if time.monotonic() - last >= _REDRAWN:
            handle.update({"text/plain": _drawn(bar)}, raw=True)
            last = time.monotonic()

    try:
        yield redraw
    finally:
        handle.update({"text/plain": "" if transient else _drawn(bar)}, raw=True)


def _drawn(bar: "Progress") -> str:
    from rich.console import Console

    page = io.StringIO()
    # Without colours a bar is as long as what is done.
    console = Console(
        file=page, width=100, no_color=True, force_terminal=False, force_jupyter=False
    )
    console.print(bar.get_renderable())
    return page.getvalue().strip()
