import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrad._disk import digest
from jaxgrad._disk.digest import checksum, content_name

X = np.arange(6, dtype=np.float32).reshape(3, 2)


def flipped(x):
    bits = x.view(np.uint8).copy()
    bits[1, 3] ^= 1
    return bits.view(x.dtype)


@pytest.mark.parametrize(
    ("path", "x"),
    [
        ("b", X),
        ("a", X.reshape(2, 3)),
        ("a", X.view(np.int32)),
        ("a", flipped(X)),
        ("a", X[:2]),
    ],
    ids=["path", "shape", "dtype", "bit", "length"],
)
def test_bytes_and_meaning_count(path, x):
    assert checksum(path, x) != checksum("a", X)
    assert content_name([(path, x)]) != content_name([("a", X)])


def test_where_an_array_is_kept_does_not_count(monkeypatch):
    expected = checksum("a", X), content_name(["text", ("a", X)])
    big_endian, transposed = X.astype(">f4"), np.asfortranarray(X)
    for x in (jnp.asarray(X), big_endian, transposed):
        assert (checksum("a", x), content_name(["text", ("a", x)])) == expected
    monkeypatch.setattr(digest, "ROWS_AT_A_TIME", 2)  # a large array is read in parts
    assert (checksum("a", X), content_name(["text", ("a", X)])) == expected


def test_a_content_name_tells_where_a_part_ends():
    names = [["ab", "c"], ["a", "bc"], ["abc"], ["abc", ("", np.zeros(0))], []]
    assert len({content_name(parts) for parts in names}) == len(names)
    assert all(len(content_name(parts)) == 32 for parts in names)
