import struct

import numpy as np
import pytest

import jaxgrad.torch as jgt
from jaxgrad.torch._reading import tensors as _tensors

NUMBERS = struct.pack("<6f", *range(6))


def read(write_zip, body, *view, numel: int = 6) -> np.ndarray:
    return jgt.read(
        write_zip(body.tensor(body.storage("0", numel), *view), {"0": NUMBERS})
    ).tensors[""]


@pytest.mark.parametrize(
    ("offset", "shape", "strides", "expected"),
    [
        (0, (2, 3), (3, 1), [[0, 1, 2], [3, 4, 5]]),
        (0, (3, 2), (1, 3), [[0, 3], [1, 4], [2, 5]]),
        (1, (2, 2), (3, 1), [[1, 2], [4, 5]]),
        (5, (), (), 5),
        (4, (3, 1), (0, 99), [[4], [4], [4]]),
        (0, (4, 3), (1, 1), [[0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4, 5]]),
        (6, (0,), (1,), []),
        (99, (2, 0), (7, 7), [[], []]),
        (5, (1,), (2**40,), [5]),
    ],
)
def test_views(write_zip, body, offset, shape, strides, expected):
    array = read(write_zip, body, offset, shape, strides)
    assert array.shape == shape
    assert array.tolist() == expected
    assert not array.flags.writeable


@pytest.mark.parametrize(
    ("offset", "shape", "strides", "reason"),
    [
        (0, (7,), (1,), "shape (7,), stride (1,) and offset 0 reach element 6 of storage '0', "),
        (6, (), (), "reach element 6 of storage '0', which holds 6"),
        (1, (2, 3), (3, 1), "reach element 6"),
        (2**62, (1,), (1,), "reach element 4611686018427387904"),
        (0, (2,), (2**60,), "reach element 1152921504606846976"),
        (-1, (1,), (1,), "storage offset is -1, expected an integer in [0, 2**63)"),
        (0, (-1,), (1,), "dimension is -1, expected"),
        (0, (2,), (-1,), "stride is -1, expected"),
        (2**63, (1,), (1,), "storage offset is 9223372036854775808, expected"),
        (0, (2, 3), (1,), "shape and stride of 2 and 1 dimensions, expected <= 64 each"),
        (0, (1,) * 65, (1,) * 65, "shape and stride of 65 and 65 dimensions"),
        (0, (0, 2**62), (1, 1), "exceeds 2**63"),
        (0, (1,), (2**62,), "exceeds 2**63"),
        (0, (2**28 + 1,), (0,), "expands the 6 elements of storage '0' to 1073741828 bytes, over"),
        (0, (2**40,) * 3, (0,) * 3, "exceeds 2**63"),
    ],
)
def test_views_that_leave_their_storage(write_zip, body, offset, shape, strides, reason):
    with pytest.raises(jgt.TorchFileError) as caught:
        read(write_zip, body, offset, shape, strides)
    assert caught.value.entry == "made/data.pkl"
    assert reason in caught.value.reason


def test_the_storage_is_what_the_pickle_declares(write_zip, body):
    # The entry is longer; PyTorch, too, takes only the declared elements.
    assert read(write_zip, body, 0, (2,), (1,), numel=2).tolist() == [0, 1]
    with pytest.raises(jgt.TorchFileError, match="reach element 2 of storage '0', which holds 2"):
        read(write_zip, body, 0, (3,), (1,), numel=2)


@pytest.mark.parametrize(
    ("rest", "reason"),
    [
        (b"]", "tensor metadata other than the bits 'conj' and 'neg'"),
        (b"}X\3\0\0\0newNs", "tensor metadata other than the bits 'conj' and 'neg'"),
        (b"}X\4\0\0\0conjNs", "tensor metadata other than the bits 'conj' and 'neg'"),
        (b"NN", "_rebuild_tensor takes 4 to 7 arguments, got 8"),
    ],
)
def test_odd_arguments(write_zip, body, rest, reason):
    with pytest.raises(jgt.TorchFileError) as caught:
        read(write_zip, body, 0, (1,), (1,), rest if reason.startswith("_") else _filled(rest))
    assert caught.value.reason.startswith(reason)


def _filled(metadata: bytes) -> bytes:
    # An empty list is no metadata at all; one that holds something is.
    return b"](Ne" if metadata == b"]" else metadata


def test_a_conjugated_storage_is_resolved_once(write_zip, body):
    stored = np.array([1 + 2j, 3 - 4j], np.complex64)
    bits = b"}X\4\0\0\0conj\x88s"
    whole = body.storage("0", 2, "ComplexFloatStorage")
    made = b"](" + body.tensor(whole, 0, (2,), (1,), bits)
    made += body.tensor(whole, 1, (3,), (0,), bits) + body.tensor(whole, 0, (2,), (1,)) + b"e"
    checkpoint = jgt.read(write_zip(made, {"0": stored.tobytes()}))
    conjugate, expanded, plain = checkpoint.tensors.values()
    np.testing.assert_array_equal(conjugate, stored.conj())
    np.testing.assert_array_equal(expanded, stored.conj()[[1, 1, 1]])
    np.testing.assert_array_equal(plain, stored)
    assert np.shares_memory(conjugate, expanded)
    assert expanded.strides == (0,)
    assert checkpoint.tied == ()


def test_a_negative_of_integers(write_zip, body):
    bits = b"}X\3\0\0\0neg\x88s"
    made = body.tensor(body.storage("0", 3, "CharStorage"), 0, (3,), (1,), bits)
    assert jgt.read(write_zip(made, {"0": b"\1\0\xff"})).tensors[""].tolist() == [-1, 0, 1]


@pytest.mark.parametrize(
    ("bit", "kind", "reason"),
    [
        (b"X\3\0\0\0neg", "BoolStorage", "dtype bool has no negative"),
        (b"X\4\0\0\0conj", "CharStorage", "dtype int8 has no conjugate"),
    ],
)
def test_bits_that_have_no_meaning(write_zip, body, bit, kind, reason):
    made = body.tensor(body.storage("0", 3, kind), 0, (3,), (1,), b"}" + bit + b"\x88s")
    with pytest.raises(jgt.TorchFileError, match=reason):
        jgt.read(write_zip(made, {"0": b"\1\0\1"}))


def test_every_dtype_has_its_size():
    sizes = {name: dtype.itemsize for name, dtype in _tensors.DTYPES.items()}
    assert {name: sizes[name] for name in ("bool", "bfloat16", "float8_e5m2", "complex64")} == {
        "bool": 1,
        "bfloat16": 2,
        "float8_e5m2": 1,
        "complex64": 8,
    }
    assert set(_tensors.STORAGE_DTYPES.values()) <= set(sizes)
