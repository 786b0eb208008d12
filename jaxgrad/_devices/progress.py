"""A progress bar on standard error."""

import contextlib
from collections.abc import Callable, Iterator

from jaxgrad._devices.processes import is_first


@contextlib.contextmanager
def progress_bar(
    total: int | None, text: str, show: bool, *, done: int = 0, transient: bool = False
) -> Iterator[Callable[[int, str], None]]:
    """Shows a progress bar in the first process, if standard error is a terminal.

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
    if not (show and is_first() and console.is_terminal):
        yield lambda amount, text: None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=transient) as bar:
        task = bar.add_task(text, total=total, completed=done)
        yield lambda amount, text: bar.update(task, advance=amount, description=text)
