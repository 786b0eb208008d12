import sys
from pathlib import Path

import pytest

from jaxgrad._disk.writable import refuse_unwritable


def test_what_can_be_written_is_not_touched(tmp_path):
    refuse_unwritable(tmp_path / "new")
    refuse_unwritable(tmp_path / "some" / "folders" / "new")
    assert not [*tmp_path.iterdir()]
    (tmp_path / "old").write_text("text")
    refuse_unwritable(tmp_path / "old")
    assert (tmp_path / "old").read_text() == "text"


def test_below_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError) as info:
        refuse_unwritable(tmp_path / "file" / "folder" / "new")
    assert str(info.value) == (
        f"'{tmp_path}/file/folder/new' can't be written: '{tmp_path}/file' is not a directory."
    )


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_where_not_even_root_can_write():
    with pytest.raises(OSError, match=r"'/proc/model' can't be written: '/proc' takes no file \("):
        refuse_unwritable(Path("/proc/model"))
