"""Tables of parameters on a terminal."""

from collections.abc import Collection, Mapping
from typing import Any

from rich.table import Table

from jaxgrad._text import nbytes, numel, size


def table(title: str, leaves: Mapping[str, Any], trained: Collection[str] | None) -> Table:
    """Paths, shapes, dtypes and bytes of arrays, and which are trained, if that is known."""
    shown = Table(title=title, title_justify="left")
    for column in ("path", "shape", "dtype", "bytes"):
        shown.add_column(column, justify="right" if column in ("shape", "bytes") else "left")
    if trained is not None:
        shown.add_column("")
    for path, leaf in leaves.items():
        cells = [path, " x ".join(map(str, leaf.shape)), str(leaf.dtype), size(nbytes(leaf))]
        if trained is None:
            shown.add_row(*cells)
        elif path in trained:
            shown.add_row(*cells, "trained", style="bold green")
        else:
            shown.add_row(*cells, "frozen", style="dim")
    total = (
        f"{sum(map(numel, leaves.values())):,} elements, {size(sum(map(nbytes, leaves.values())))}"
    )
    if trained is None:
        shown.caption = total
    else:
        moved = sum(numel(leaf) for path, leaf in leaves.items() if path in trained)
        shown.caption = f"{total}, {moved:,} trained"
    return shown
