import struct

import pytest

import jaxgrad.torch as jgt


def small_body(body, key: str = "0", count: int = 2) -> bytes:
    return body.tensor(body.storage(key, count, legacy=True), 0, (count,), (1,))


FLOATS = struct.pack("<2f", 1.5, -2.0)


def refusal(path) -> jgt.TorchFileError:
    with pytest.raises(jgt.TorchFileError) as caught:
        jgt.read(path)
    assert caught.value.path == str(path)
    return caught.value


def test_storages_come_in_the_order_of_the_keys(write_legacy, body):
    made = b"](" + small_body(body, "b") + small_body(body, "a") + b"e"
    path = write_legacy(made, {"a": (2, FLOATS), "b": (2, FLOATS[::-1])})
    tensors = jgt.read(path).tensors
    assert tensors["1"].tobytes() == FLOATS
    assert tensors["0"].tobytes() == FLOATS[::-1]


def test_a_file_of_python_2(write_legacy):
    # Python 2 writes byte strings, and names its built-ins `__builtin__`.
    storage = b"(U\7storagectorch\nFloatStorage\nU\x010U\3cpuK\2NtQ"
    tensor = b"ctorch._utils\n_rebuild_tensor\n(" + storage + b"K\0K\2\x85K\1\x85tR"
    made = (
        b"ccollections\nOrderedDict\n](]U\6weighta"
        + tensor
        + b"ae\x85Rq\1}U\1_c__builtin__\nset\n](e\x85Rsb"
    )
    path = write_legacy(made.replace(b"aect", b"ct"), {"0": (2, FLOATS)})
    assert jgt.read(path).tensors["weight"].tolist() == [1.5, -2.0]


@pytest.mark.parametrize(
    ("options", "entry", "reason"),
    [
        ({"protocol": 1000}, "protocol", "a legacy file of another protocol than 1001"),
        (
            {"system": {"little_endian": False}},
            "system information",
            "not written on a little-endian machine",
        ),
        ({"system": [1]}, "system information", "not written on a little-endian machine"),
        ({"storages": {}}, "storage 0", "the file has no bytes for this storage"),
        (
            {"storages": {"1": (2, FLOATS)}},
            "storage keys",
            "a key without a storage, or a repeated one",
        ),
        (
            {"storages": {"0": (3, FLOATS)}},
            "storage 0",
            "has 3 elements of float32, but the object records another size",
        ),
        (
            {"storages": {"0": (-1, FLOATS)}},
            "storage 0",
            "has -1 elements of float32, but the object records another size",
        ),
        (
            {"storages": {"0": (2, FLOATS[:-1])}},
            "storage 0",
            "the file ends inside this storage: it is truncated",
        ),
    ],
)
def test_parts_that_do_not_fit(write_legacy, body, options, entry, reason):
    path = write_legacy(small_body(body), **{"storages": {"0": (2, FLOATS)}, **options})
    error = refusal(path)
    assert (error.entry, error.reason) == (entry, reason)


def test_a_file_that_ends_before_a_storage(write_legacy, body):
    path = write_legacy(small_body(body), {"0": (2, FLOATS)})
    path.write_bytes(path.read_bytes()[:-12])
    assert refusal(path).reason == "the file ends before this storage: it is truncated"


@pytest.mark.parametrize(
    ("pid", "entry", "reason"),
    [
        (b"(X\6\0\0\0moduletQ", "object", "a module's persistent id without a class"),
        (b"(X\5\0\0\0otherNtQ", "object", "a persistent id of kind 'other', expected 'storage'"),
        (
            b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000NK\2(X\1\0\0\x001K\0K\1ttQ",
            "object",
            "a storage that views another storage",
        ),
        (
            b"(X\7\0\0\0storagectorch\nQInt8Storage\nX\1\0\0\x000NK\2NtQ",
            "storage 0",
            "is a quantised tensor",
        ),
    ],
)
def test_persistent_ids_of_other_kinds(write_legacy, pid, entry, reason):
    error = refusal(write_legacy(pid, {"0": (2, FLOATS)}))
    assert error.entry == entry
    assert error.reason.startswith(reason)


def test_one_storage_described_in_two_ways(write_legacy, body):
    made = b"](" + small_body(body, "0", 2) + small_body(body, "0", 1) + b"e"
    error = refusal(write_legacy(made, {"0": (2, FLOATS)}))
    assert error.reason.startswith("storage '0' is described in two ways")


def test_a_module_is_its_class_without_its_source(write_legacy):
    made = b"(X\6\0\0\0modulec__main__\nNet\nX\4\0\0\0a.pyX\x09\0\0\0import ostQ)\x81}b"
    assert jgt.read(write_legacy(made)).opaque == {"": "__main__.Net"}


def test_no_persistent_id_outside_of_the_object(tmp_path, write_legacy):
    path = write_legacy(b"N")
    data = path.read_bytes()
    path.write_bytes(data.replace(b"\x80\x02M\xe9\x03.", b"\x80\x02X\1\0\0\0a\x85Q."))
    error = refusal(path)
    assert error.entry == "protocol"
    assert error.reason.startswith("a persistent id outside of the object")
