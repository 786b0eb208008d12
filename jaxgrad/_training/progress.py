"""The progress bar of a run."""

import contextlib
from collections.abc import Callable, Iterator

from jaxgrad._devices.processes import is_first


@contextlib.contextmanager
def progress_bar(total: int | None, done: int, show: bool) -> Iterator[Callable[[int, str], None]]:
    """A progress bar on standard error, where that is a terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    if not (show and is_first() and console.is_terminal):
        yield lambda rows, text: None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("compiling", total=total, completed=done)
        yield lambda rows, text: bar.update(task, advance=rows, description=text)
