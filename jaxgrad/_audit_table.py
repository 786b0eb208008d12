"""An audit as a table, on a terminal and in a notebook."""

import html
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from jaxgrad._leaks import Row
from jaxgrad._messages import count, size

if TYPE_CHECKING:
    from jaxgrad._audit import Audit

_HEADER = ("", "path", "array", "", "gradient", "norm", "state", "moved", "why")


def as_text(audit: "Audit") -> str:
    """The table in plain text, the totals, and the leaks."""
    cells = [_HEADER, *_cells(audit)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join(f"{c:{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in cells
    ]
    return "\n".join([*lines, "", *_totals(audit), *_found(audit)])


def as_html(audit: "Audit") -> str:
    """The table in HTML; colours that read on a light and on a dark page."""
    rows = []
    for row, cells in zip(audit.rows, _cells(audit), strict=True):
        colour = "#d9534f" if cells[0] else "#3a9a5c" if row.trained else "inherit"
        opacity = 1 if cells[0] or row.trained else 0.6
        style = f"color:{colour};opacity:{opacity}"
        rows.append(f'<tr style="{style}">{_tags("td", cells)}</tr>')
    below = "".join(f"<p>{html.escape(line)}</p>" for line in [*_totals(audit), *_found(audit)])
    return (
        f'<table style="text-align:left"><thead><tr>{_tags("th", _HEADER)}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>{below}"
    )


def _tags(tag: str, cells: Sequence[str]) -> str:
    style = ' style="text-align:left"'
    return "".join(f"<{tag}{style}>{html.escape(cell)}</{tag}>" for cell in cells)


def _cells(audit: "Audit") -> Iterator[tuple[str, ...]]:
    at_fault = {path for leak in audit.leaks for path in leak.paths}
    for row in audit.rows:
        yield (
            "!" * (row.path in at_fault),
            row.path,
            row.spec,
            ("trained" if row.trained else "frozen") + ", unused" * (not row.used),
            row.gradient,
            f"{row.share:.1%}" if row.share else "-",
            size(row.state) if row.state else "-",
            _moved(row),
            ", ".join(row.why),
        )


def _moved(row: Row) -> str:
    if row.change is None:
        return "-"
    return f"{row.change.largest:.2g}" if row.change.largest else "in a bit"


def _totals(audit: "Audit") -> Iterator[str]:
    spent, split = audit.cost, audit.split
    yield (
        f"A step: {flops(spent.flops)}, {size(spent.nbytes)} read and written, "
        f"{size(spent.peak)} at its peak."
    )
    if split:
        times = f" (the step: {spent.flops / split.flops:.3g} times as many)" if split.flops else ""
        yield (
            f"Split by wrt: {flops(split.flops)}{times}, {size(split.nbytes)} read and written, "
            f"{size(split.peak)} at its peak."
        )
    frozen = sum(row.state for row in audit.rows if not row.trained)
    yield f"Optimizer state: {size(audit.state)}, {size(frozen)} of it for frozen parameters."
    if audit.staging:
        yield f"Staging: {str(audit.staging).splitlines()[0]}."


def _found(audit: "Audit") -> Iterator[str]:
    if not audit.leaks:
        yield f"No leaks in {audit.steps} steps."
        return
    yield f"{count(audit.leaks, 'leak', verb=False)}:"
    for leak in audit.leaks:
        yield f"- {leak}"


def flops(n: float) -> str:
    """A number of operations: `12 FLOP`, `3.1 MFLOP`."""
    for unit in ("", "k", "M", "G", "T"):
        if n < 1000 or unit == "T":
            break
        n /= 1000
    return f"{n:.3g} {unit}FLOP"
