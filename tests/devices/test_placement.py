import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_on_eight_devices():
    """The tests of `eight_devices.py`, in a process in which the CPU is eight devices."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    flags += " --xla_backend_optimization_level=0"  # compiles faster
    file = Path(__file__).parents[1].joinpath("eight_devices.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    environment.pop("PYTEST_ADDOPTS", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
