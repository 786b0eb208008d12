import io
import struct
import time
import warnings
import zipfile

import pytest

import jaxgrad.torch as jgt

SMALL = b"\0" * 8


def small_body(body) -> bytes:
    return body.tensor(body.storage("0", 2), 0, (2,), (1,))


@pytest.fixture
def small(write_zip, body):
    """A file with one tensor of two elements."""
    return write_zip(small_body(body), {"0": SMALL})


def refusal(path) -> jgt.TorchFileError:
    with pytest.raises(jgt.TorchFileError) as caught:
        jgt.read(path)
    assert caught.value.path == str(path)
    return caught.value


def patch(path, find: bytes, offset: int, fields: str, *values: int, last: bool = False) -> None:
    """Overwrites fields `offset` bytes after a zip signature."""
    data = bytearray(path.read_bytes())
    at = (data.rindex if last else data.index)(find)
    struct.pack_into(fields, data, at + offset, *values)
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["made/data.pkl", "made/data/0"])
def test_two_entries_of_one_name(small, name):
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(small, "a") as file:
        file.writestr(name, SMALL)
    error = refusal(small)
    assert (error.entry, error.reason) == (name, "the zip holds two entries of this name")


@pytest.mark.parametrize("name", ["made/data.pkl", "made/data/0"])
def test_a_compressed_entry(tmp_path, small, name):
    path = tmp_path / "compressed.pt"
    with zipfile.ZipFile(small) as source, zipfile.ZipFile(path, "w") as target:
        for other in source.namelist():
            method = zipfile.ZIP_DEFLATED if other == name else zipfile.ZIP_STORED
            target.writestr(other, source.read(other), method)
    error = refusal(path)
    assert error.entry == name
    assert error.reason.startswith("is compressed, which torch.save never does; unzip the file")


def test_a_zip_bomb_is_not_unfolded(tmp_path, body):
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("made/data.pkl", b"\x80\x02" + b"N0" * (16 << 20) + b"N.")
    start = time.perf_counter()
    assert refusal(path).reason.startswith("is compressed")
    assert time.perf_counter() - start < 1


def test_an_encrypted_entry(small):
    patch(small, b"PK\1\2", 8, "<H", 1, last=True)
    error = refusal(small)
    assert (error.entry, error.reason) == ("made/data/0", "is encrypted")


def test_overlapping_entries(small):
    # The second directory record points at the first entry's bytes.
    patch(small, b"PK\1\2", 42, "<L", 0, last=True)
    error = refusal(small)
    assert (error.entry, error.reason) == ("made/data/0", "overlaps another zip entry")


def test_an_entry_inside_another(small):
    data = small.read_bytes()
    with zipfile.ZipFile(small) as file:
        pickled, stored = file.infolist()
    size = stored.header_offset + 1 - (pickled.header_offset + 30 + len(pickled.filename))
    patch(small, b"PK\1\2", 20, "<2L", size, size)
    error = refusal(small)
    assert len(small.read_bytes()) == len(data)
    assert (error.entry, error.reason) == ("made/data/0", "overlaps another zip entry")


@pytest.mark.parametrize(
    ("find", "offset", "fields", "values", "entry", "reason"),
    [
        (b"PK\1\2", 42, "<L", (2,), "", "no zip record 0304 at byte 2: the file is damaged"),
        (b"PK\1\2", 42, "<L", (2**31,), "", "the file ends inside a zip record: it is truncated"),
        (b"PK\1\2", 20, "<2L", (2**31, 2**31), "made/data.pkl", "reaches past the zip directory"),
        (b"PK\1\2", 28, "<H", (9,), "", "no zip record 0102"),
        (b"PK\1\2", 46, "<B", (65,), "made/data.pkl", "its own header names it 'made/data.pkl'"),
        (b"PK\1\2", 16, "<L", (1,), "made/data.pkl", "is damaged: its checksum is"),
        (b"PK\1\2", 20, "<2L", (2**32 - 1, 5), "made/data.pkl", "reaches past the zip directory"),
        (b"PK\5\6", 4, "<H", (1,), "", "a zip file in several parts"),
        (b"PK\5\6", 10, "<H", (65535,), "", "a zip directory of"),
        (b"PK\5\6", 10, "<H", (1,), "", "the zip directory is shorter than declared"),
        (b"PK\5\6", 12, "<L", (1,), "", "a zip directory of 1 bytes for 2 entries"),
        (b"PK\5\6", 16, "<L", (1,), "", "the zip directory should end at byte"),
        (b"PK\5\6", 20, "<H", (1,), "", "bytes after the end of the zip directory"),
    ],
)
def test_records_that_lie(small, find, offset, fields, values, entry, reason):
    if find == b"PK\1\2" and offset == 46:
        patch(small, find, offset + 5, "<B", 65)
        error = refusal(small)
        assert error.entry == "made/Aata.pkl"
    else:
        patch(small, find, offset, fields, *values)
        error = refusal(small)
        assert error.entry == entry
    assert error.reason.startswith(reason)


def test_a_zip64_field_that_is_too_short(small):
    with zipfile.ZipFile(small) as file:
        entries = [(info, file.read(info)) for info in file.infolist()]
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for info, content in entries:
            info.extra = struct.pack("<2HL", 1, 4, 7)
            file.writestr(info, content)
    small.write_bytes(out.getvalue())
    patch(small, b"PK\1\2", 20, "<L", 2**32 - 1)
    assert refusal(small).reason == "a zip64 field is too short"


def test_missing_and_short_storages(write_zip, body):
    error = refusal(write_zip(small_body(body)))
    assert (error.entry, error.reason) == ("made/data/0", "this entry is missing from the zip")
    error = refusal(write_zip(small_body(body), {"0": b"1234567"}))
    assert error.entry == "made/data/0"
    assert error.reason == "holds 7 bytes, but its tensors need 8: truncated"


def test_a_storage_key_is_only_a_name(write_zip, body):
    made = body.tensor(body.storage("../data.pkl", 2), 0, (2,), (1,))
    assert refusal(write_zip(made)).entry == "made/data/../data.pkl"


def test_zips_that_are_no_checkpoints(tmp_path, write_zip, body):
    assert refusal(write_zip(b"N", **{"constants.pkl": b"N."})).reason.startswith("a TorchScript")
    path = tmp_path / "other.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme.txt", "hello")
    expected = "a zip with 0 `data.pkl` at its top, expected one: not of torch.save"
    assert refusal(path).reason == expected
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("a/data.pkl", "N.")
        file.writestr("b/data.pkl", "N.")
    assert refusal(path).reason.startswith("a zip with 2 `data.pkl`")


def test_a_big_endian_file(write_zip, body):
    path = write_zip(small_body(body), {"0": SMALL}, byteorder=b"big")
    assert refusal(path).reason.startswith("not written on a little-endian machine")
    assert jgt.read(write_zip(small_body(body), {"0": SMALL}, byteorder=b"little")).tensors


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"(X\6\0\0\0moduleNtQ", "a persistent id of kind 'module', expected 'storage'"),
        (b"X\7\0\0\0storage\x85Q", "a storage's persistent id has 1 fields, expected 5"),
        (b"(X\7\0\0\0storageNNNNtQ", "a storage's persistent id without a type or key"),
        (
            b"(X\7\0\0\0storagecos\nsystem\nX\1\0\0\x000NK\1tQ",
            "unknown storage type os.system",
        ),
        (
            b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000NJ\xff\xff\xff\xfftQ",
            "storage size is -1, expected an integer in [0, 2**63)",
        ),
        (
            b"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\x000N\x8a\x08"
            + b"\xff" * 7
            + b"\x7ftQ",
            "storage bytes is 36893488147419103228, expected an integer in [0, 2**63)",
        ),
    ],
)
def test_persistent_ids_of_other_kinds(write_zip, body, reason):
    error = refusal(write_zip(body, {"0": SMALL}))
    assert error.entry == "made/data.pkl"
    assert error.reason.startswith(f"{reason} (opcode BINPERSID at byte ")
