"""Cost of a step in `fit`: checkpoints, examples, parameters, devices.

    python -m benchmarks.training stall      # a save every 100 steps against none
    python -m benchmarks.training cost       # a step against rows, parameters and devices

Ratios are within one run: the variants alternate, and the median is reported. The devices of `cost`
are virtual devices on this machine's cores and share its speed, so only overhead is visible.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise

VIRTUAL = "--xla_force_host_platform_device_count"


def problem(width: int, rows: int):
    """A regression by an MLP of two square layers, and its data."""
    import jax
    import numpy as np

    draw = np.random.default_rng(0)
    params = {
        "trunk": draw.normal(size=(width, width)).astype(np.float32) / width**0.5,
        "head": draw.normal(size=(width, width)).astype(np.float32) / width**0.5,
    }
    data = {"x": draw.normal(size=(rows, width)).astype(np.float32)}

    def loss(params, batch):
        h = jax.numpy.tanh(batch["x"] @ params["trunk"])
        return ((h @ params["head"] - batch["x"]) ** 2).mean()

    return loss, params, data


def hundreds(width: int, batch: int, steps: int, **options) -> list[float]:
    """Seconds of every hundred steps except the first, which compile."""
    import optax

    import jaxgrad as jg

    loss, params, data = problem(width, 10 * batch)
    clock: list[float] = []
    jg.fit(
        loss,
        params,
        data,
        optax.sgd(1e-3, momentum=0.9),
        epochs=steps // 10,
        batch_size=batch,
        callback_every=10,
        callbacks=[lambda state: clock.append(time.perf_counter())],
        progress=False,
        **options,
    )
    return [b - a for a, b in pairwise(clock[9::10])]


def stall(repeats: int) -> None:
    """Compares the hundred steps after a save with the next hundred."""
    import jaxgrad as jg

    print("width  params   ms/step   with a save per 100 steps, median (quartiles)")
    for width, pairs in ((128, 40), (256, 20), (512, 10), (1024, 4)):
        with tempfile.TemporaryDirectory() as folder:
            run = jg.Checkpoints(folder, every=20)  # of 10 steps: in every other hundred
            times = hundreds(width, 256, 200 * pairs * repeats + 100, checkpoint=run)
        saved, plain = times[1::2], times[2::2]  # the first save is after two hundred steps
        longer = [a / b - 1 for a, b in zip(saved, plain, strict=False)]
        low, middle, high = statistics.quantiles(longer, n=4)
        ms = statistics.median(plain) * 10
        print(f"{width:5}  {2 * width**2:9,}{ms:8.2f}   {middle:+.1%} ({low:+.1%} to {high:+.1%})")


def cost() -> None:
    """Milliseconds per step as rows, parameters or devices grow."""
    print("width  rows a step  devices  sharding   ms/step")
    for width, batch in ((256, 256), (256, 1024), (512, 256), (1024, 256)):
        print(f"{width:5}{batch:13}{1:9}  {'none':8}{_elsewhere(width, batch, 1, ''):10.2f}")
    for devices in (1, 2, 8):
        for sharding in ("replicated", "fsdp"):
            ms = _elsewhere(512, 1024, devices, sharding)
            print(f"{512:5}{1024:13}{devices:9}  {sharding:8}{ms:10.2f}")


def _elsewhere(width: int, batch: int, devices: int, sharding: str) -> float:
    """Runs `one` in a new process with this many devices."""
    command = [sys.executable, "-m", "benchmarks.training", "one"]
    command += [str(width), str(batch), str(devices), sharding]
    environment = {**os.environ, "XLA_FLAGS": f"{VIRTUAL}={devices}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout)


def one(width: int, batch: int, devices: int, sharding: str) -> None:
    import jax

    options = {}
    if sharding:
        auto = (jax.sharding.AxisType.Auto,)
        options = {"mesh": jax.make_mesh((devices,), ("data",), auto), "sharding": sharding}
    print(statistics.median(hundreds(width, batch, 600, **options)) * 10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["stall", "cost", "one"])
    parser.add_argument("options", nargs="*")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    if args.what == "stall":
        stall(args.repeats)
    elif args.what == "cost":
        cost()
    else:
        width, batch, devices, *sharding = args.options
        one(int(width), int(batch), int(devices), sharding[0] if sharding else "")


if __name__ == "__main__":
    main()
