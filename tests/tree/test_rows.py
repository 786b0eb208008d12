"""One number of rows: counted from the arrays, or refused with the paths and their lengths."""

import jax
import numpy as np
import pytest

import jaxgrad as jg
from jaxgrad._tree.rows import common_rows, rows_of


def message(fun, *args):
    with pytest.raises(jg.RowsError) as info:
        fun(*args)
    return str(info.value)


def test_the_rows_of_a_tree_with_a_hole():
    spec = jax.ShapeDtypeStruct((3, 2), np.float32)
    assert rows_of({"x": np.ones(3), "hole": None, "spec": spec}) == 3


def test_no_rows_are_counted_and_are_no_dataset():
    assert common_rows({"x": (0, 2)}, "they") == 0
    assert (
        message(rows_of, {"x": np.ones((0, 2))}) == "the dataset has no rows: 'x' has shape [0, 2]."
    )


@pytest.mark.parametrize(
    ("shapes", "found"),
    [
        ({}, "there are no arrays"),
        ({"a": (3,), "b": (4, 1), "c": (3, 2)}, "'a', 'c' have 3 and 'b' has 4"),
        ({"a": (3,), "b": ()}, "'a' has 3 and 'b' is a scalar"),
        ({"a": (), "b": ()}, "'a', 'b' are scalars"),
    ],
)
def test_paths_and_lengths_are_named(shapes, found):
    expected = f"they must have the same number of rows (axis 0): {found}. Do this."
    assert message(common_rows, shapes, "they", "Do this.") == expected


def test_one_among_many_is_found():
    text = message(common_rows, {str(i): (4 + (i == 40),) for i in range(50)}, "they")
    assert text.endswith("and 41 more have 4 and '40' has 5.")
