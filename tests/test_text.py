"""The words that errors and tables share."""

import pytest

from jaxgrad._text import table


def test_the_columns_of_a_table_are_aligned():
    rows = [("path", "verdict"), ("head/kernel", "right"), ("b", "")]
    assert table(rows) == ["path         verdict", "head/kernel  right", "b"]
    assert table(iter(rows), indent="  ")[1] == "  head/kernel  right"
    assert table([]) == []


def test_the_rows_of_a_table_are_equally_long():
    with pytest.raises(ValueError, match="shorter"):
        table([("path", "verdict"), ("head",)])
