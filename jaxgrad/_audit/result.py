"""The result of an audit: the record, and its table in a terminal and in a notebook."""

import dataclasses
import html
from collections.abc import Iterator, Sequence

from jaxgrad._audit.cost import Cost
from jaxgrad._audit.rules import Leak, Row
from jaxgrad._staging.report import Report
from jaxgrad._text import count, size, table, work
from jaxgrad._tree.bitwise import LeakError

_HEADER = ("", "path", "array", "", "gradient", "norm", "state", "moved", "why")


def as_text(audit: "Audit") -> str:
    """The table in plain text, the totals, and the leaks."""
    rows = table([_HEADER, *_cells(audit)])
    return "\n".join([*rows, "", *_totals(audit), *_found(audit)])


def as_html(audit: "Audit") -> str:
    """The table in HTML, in colours that are legible on a light and on a dark page."""
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
    return f"{row.change.largest:.2g}" if row.change.largest else "bits only"


def _totals(audit: "Audit") -> Iterator[str]:
    spent, split = audit.cost, audit.split
    yield (
        f"A step: {work(spent.flops)}, {size(spent.nbytes)} read and written, "
        f"{size(spent.peak)} at its peak."
    )
    if split:
        ratio = f"{spent.flops / split.flops:.3g}" if split.flops else ""
        times = f" (the step takes {ratio} times as many)" if ratio else ""
        yield (
            f"Split by wrt: {work(split.flops)}{times}, {size(split.nbytes)} read and written, "
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


@dataclasses.dataclass(frozen=True, repr=False)
class Audit:
    """What a training step does to each parameter; made by `jaxgrad.audit`, printed as a table.

    Attributes:
        rows: what was found about each parameter.
        leaks: what is wrong.
        cost: what a step costs.
        split: the cost of a step of the same optimizer if only the trained parameters are
            differentiated and passed to it; None if it can't work on one half of them.
        state: bytes of the optimizer's state.
        staging: what `jaxgrad.stage` would save; None if the loss can't be staged.
        steps: the number of steps that were taken.
    """

    rows: tuple[Row, ...]
    leaks: tuple[Leak, ...]
    cost: Cost
    split: Cost | None
    state: int
    staging: Report | None
    steps: int

    def __repr__(self) -> str:
        return as_text(self)

    def _repr_html_(self) -> str:
        return as_html(self)

    def __getitem__(self, path: str) -> Row:
        """The row of the parameter at a path."""
        for row in self.rows:
            if row.path == path:
                return row
        raise KeyError(path)

    def raise_if_leaky(self) -> None:
        """Raises if there are leaks; meant as the last line of a test.

        Raises:
            LeakError: there are leaks; the message gives the paths, what, why and the fix of each.
        """
        if self.leaks:
            lines = [f"{count(self.leaks, 'leak', verb=False)}:", *map(str, self.leaks)]
            raise LeakError("\n- ".join(lines))
