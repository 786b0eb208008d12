"""A short run of `fuzz_reader.py`; the long one is a command of its own."""

import pathlib
import re
import subprocess
import sys


def test_a_short_run():
    script = pathlib.Path(__file__).with_name("fuzz_reader.py")
    command = [sys.executable, str(script), "--cases", "1000", "--seed", "2013"]
    out = subprocess.run(command, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    found = re.search(r"1000 cases in \d+ s: .*'refused': (\d+), 'read': (\d+)", out.stdout)
    found = found or re.search(
        r"1000 cases in \d+ s: .*'read': (\d+), 'refused': (\d+)", out.stdout
    )
    assert found is not None, out.stdout
    # Mutations that all fail at the first byte, or that change nothing, would test nothing.
    assert min(int(count) for count in found.groups()) > 50
