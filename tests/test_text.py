"""The words that errors and tables share."""

import pytest

from jaxgrad._text import si, size, table, work


def test_the_columns_of_a_table_are_aligned():
    rows = [("path", "verdict"), ("head/kernel", "right"), ("b", "")]
    assert table(rows) == ["path         verdict", "head/kernel  right", "b"]
    assert table(iter(rows), indent="  ")[1] == "  head/kernel  right"
    assert table([]) == []


def test_the_rows_of_a_table_are_equally_long():
    with pytest.raises(ValueError, match="shorter"):
        table([("path", "verdict"), ("head",)])


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0"),
        (812, "812"),
        (999.6, "1k"),
        (1000, "1k"),
        (12_832, "12.8k"),
        (999_499, "999k"),
        (999_500, "1M"),
        (2.5e9, "2.5G"),
        (1e12, "1T"),
        (3.14159e15, "3.14P"),
        (1e18, "1E"),
    ],
)
def test_three_digits_and_a_prefix(n, text):
    assert si(n) == text


def test_a_unit_stands_after_a_space():
    assert (size(812), size(10_270), size(999_999)) == ("812 B", "10.3 kB", "1 MB")
    assert (work(12), work(3.1e6)) == ("12 FLOP", "3.1 MFLOP")
