import pytest

from jaxgrad._disk.atomic import replacing


def fill_the_disk(file):
    file.write(b"ne")
    raise OSError(28, "No space left on device")


def test_the_old_file_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(b"old")
    with replacing(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    with pytest.raises(OSError, match="No space left"), replacing(path) as file:
        fill_the_disk(file)
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["model.bin"]
