import shutil

import pytest

from jaxgrad._disk.atomic import remove_directory, replacing, replacing_directory, unfinished


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


def fill(directory, text, then=None):
    directory.mkdir()
    (directory / "arrays").write_text(text)
    if then:
        raise then


def names(path):
    return [p.name for p in path.iterdir()]


def test_the_old_directory_until_the_new_one_is_complete(tmp_path):
    path = tmp_path / "runs/model"
    for text, before in (("old", None), ("new", "old")):
        new = unfinished(path)
        with replacing_directory(path, new):
            fill(new, text)
            assert (path / "arrays").read_text() == before if before else not path.exists()
        assert (path / "arrays").read_text() == text
        assert names(path.parent) == ["model"]


def test_a_directory_that_is_not_completed_leaves_what_was_there(tmp_path):
    path = tmp_path / "model"
    fill(path, "old")
    new = unfinished(path)
    with pytest.raises(OSError, match="No space left"), replacing_directory(path, new):
        fill(new, "half", then=OSError(28, "No space left on device"))
    assert (path / "arrays").read_text() == "old"
    assert names(tmp_path) == ["model"]


def test_a_kill_while_a_directory_is_deleted_leaves_no_part_under_its_name(tmp_path, monkeypatch):
    fill(tmp_path / "model", "old")

    def killed(path, ignore_errors):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        remove_directory(tmp_path / "model")
    (left,) = names(tmp_path)
    assert left.startswith(".model.old-")


def test_temporary_names_are_beside_the_name_and_differ_unless_they_are_shared(tmp_path):
    path = tmp_path / "model"
    assert unfinished(path).parent == tmp_path and unfinished(path) != unfinished(path)
    assert unfinished(path, "7f") == unfinished(path, "7f") == tmp_path / ".model.new-7f"
