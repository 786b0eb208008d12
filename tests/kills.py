"""Kills a training run again and again, and compares what it comes to with a run left alone.

    python -m tests.kills --kills 100
    python -m tests.kills --kills 100 --processes 2

Each life of the run is a process of its own that resumes and trains, and is killed (`kill -9`) at a
random moment after its first step; with a save every few steps it spends most of its time in
saves and deletions. Of two processes that train together either is killed, and then the other,
which waits for it. The last life is left alone. Parameters, optimizer state and losses must then be
those of a run that was not killed, to the bit.
"""

import argparse
import contextlib
import hashlib
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROWS, BATCH, EVERY = 40, 4, 10


def train(directory: Path, epochs: int, address: list[str]) -> str:
    """Trains, resuming what there is; returns a digest of all that it came to."""
    import jax
    import numpy as np
    import optax
    from jax.sharding import Mesh

    import jaxgrad as jg
    from jaxgrad._devices.processes import whole

    mesh = None
    if address:
        coordinator, processes, process = address
        jax.distributed.initialize(coordinator, int(processes), int(process))
        mesh = Mesh(np.array(jax.devices()), ("data",))
    rng = np.random.default_rng(0)
    params = {
        "trunk": rng.normal(size=(6, 16)).astype(np.float32),
        "head": rng.normal(size=(16, 3)).astype(np.float32),
    }
    dataset = {
        "x": rng.normal(size=(ROWS, 6)).astype(np.float32),
        "y": rng.normal(size=(ROWS, 3)).astype(np.float32),
    }

    def loss(params, batch, key):
        h = jax.numpy.tanh(batch["x"] @ params["trunk"])
        h = h + 0.01 * jax.random.normal(key, h.shape)
        return ((h @ params["head"] - batch["y"]) ** 2).mean()

    state = jg.fit(
        loss,
        params,
        dataset,
        jg.param_groups({"head": optax.sgd(1e-3, momentum=0.9)}),
        epochs=epochs,
        batch_size=BATCH,
        callback_every=EVERY,
        key=jax.random.key(0),
        mesh=mesh,
        sharding="fsdp" if mesh else "replicated",
        callbacks=[lambda state: print("step", state.step, flush=True)],
        checkpoint=jg.Checkpoints(directory, keep=2, best=1),
        resume=True,
        progress=False,
    )
    digest = hashlib.blake2b()
    for leaf in jax.tree.leaves((state.params, state.opt_state, state.losses)):
        digest.update(whole(leaf).tobytes())
    return digest.hexdigest()


def life(directory: Path, epochs: int, processes: int) -> list[subprocess.Popen[str]]:
    """The processes that resume and train, together where there are several."""
    command = [sys.executable, "-m", "tests.kills", "--train", str(directory)]
    command += ["--epochs", str(epochs)]
    if processes == 1:
        return [subprocess.Popen(command, stdout=subprocess.PIPE, text=True)]
    with socket.socket() as s:
        s.bind(("localhost", 0))
        coordinator = f"localhost:{s.getsockname()[1]}"
    return [
        subprocess.Popen(
            [*command, "--address", coordinator, str(processes), str(i)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # what it says of the other's death
            text=True,
        )
        for i in range(processes)
    ]


def kill_again_and_again(
    directory: Path, epochs: int, kills: int, seed: int, processes: int = 1
) -> dict[str, int]:
    """Kills so many lives of a run, and says at what moments."""
    moments = {"kills": 0, "in a save": 0, "in a deletion": 0, "steps saved": 0}
    draw = random.Random(seed)
    while moments["kills"] < kills:
        with contextlib.ExitStack() as stack:
            running = [stack.enter_context(p) for p in life(directory, epochs, processes)]
            for line in running[0].stdout or ():  # Gloo says something there, too
                if line.startswith("step"):
                    break
            time.sleep(draw.uniform(0.0, 1.0))
            ended = running[0].poll() is not None
            draw.shuffle(running)
            for process in running:
                process.kill()
                time.sleep(draw.uniform(0.0, 0.1) * (processes > 1))
        if ended:
            raise SystemExit(f"the run ended after {moments['kills']} kills: give it more epochs")
        names = [path.name for path in (directory / "steps").iterdir()]
        moments["kills"] += 1
        moments["in a save"] += any("tmp" in name for name in names)
        moments["in a deletion"] += any(name.endswith(".gone") for name in names)
        moments["steps saved"] = max((int(name) for name in names if name.isdecimal()), default=0)
    return moments


def finished(directory: Path, epochs: int, processes: int = 1) -> str:
    """The digest of a run whose last life is left alone."""
    with contextlib.ExitStack() as stack:
        running = [stack.enter_context(p) for p in life(directory, epochs, processes)]
        first, *_ = [process.communicate()[0] for process in running]
    return first.split()[-1]


def main() -> None:
    """Runs the comparison, or one life of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--epochs", type=int, help="enough that no life but the last ends")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=Path)
    parser.add_argument("--address", nargs=3, default=[])
    options = parser.parse_args()
    if options.train:
        print(train(options.train, options.epochs, options.address))
        return
    root = Path(tempfile.mkdtemp())
    # Saves of several processes take longer, since they have to agree.
    epochs = options.epochs or (10_000 if options.processes == 1 else 2_000)
    run = {"epochs": epochs, "processes": options.processes}
    moments = kill_again_and_again(root / "killed", kills=options.kills, seed=options.seed, **run)
    same = finished(root / "killed", **run) == finished(root / "left", **run)
    shutil.rmtree(root)
    print(f"{moments}: {'equal to the bit' if same else 'NOT equal'}")
    sys.exit(not same)


if __name__ == "__main__":
    main()
