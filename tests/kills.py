"""Kills a training run again and again, and compares what it comes to with a run left alone.

    python -m tests.kills --kills 100

Each life of the run is a process of its own that resumes and trains, and is killed (`kill -9`) at a
random moment after its first step; with a save every few steps it spends most of its time in
saves and deletions. The last life is left alone. Parameters, optimizer state and losses must then
be those of one uninterrupted process, to the bit.
"""

import argparse
import hashlib
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROWS, BATCH, EVERY = 40, 4, 10


def train(directory: Path, epochs: int) -> str:
    """Trains, resuming what there is; returns a digest of all that it came to."""
    import jax
    import numpy as np
    import optax

    import jaxgrad as jg

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
        every=EVERY,
        key=jax.random.key(0),
        callbacks=[lambda state: print(state.step, flush=True)],
        checkpoint=jg.Checkpoints(directory, keep=2, best=1),
        resume=True,
        progress=False,
    )
    digest = hashlib.blake2b()
    for leaf in jax.tree.leaves((state.params, state.opt_state, state.losses)):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def life(directory: Path, epochs: int) -> subprocess.Popen[str]:
    """A process that resumes and trains."""
    command = [
        sys.executable,
        "-m",
        "tests.kills",
        "--train",
        str(directory),
        "--epochs",
        str(epochs),
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def kill_again_and_again(directory: Path, epochs: int, kills: int, seed: int) -> dict[str, int]:
    """Kills so many lives of a run, and says at what moments."""
    moments = {"kills": 0, "in a save": 0, "in a deletion": 0}
    draw = random.Random(seed)
    while moments["kills"] < kills:
        with life(directory, epochs) as process:
            process.stdout.readline()
            time.sleep(draw.uniform(0.0, 1.0))
            ended = process.poll() is not None
            process.kill()
        if ended:
            raise SystemExit(f"the run ended after {moments['kills']} kills: give it more epochs")
        names = [path.name for path in (directory / "steps").iterdir()]
        moments["kills"] += 1
        moments["in a save"] += any("tmp" in name for name in names)
        moments["in a deletion"] += any(name.endswith(".gone") for name in names)
    return moments


def finished(directory: Path, epochs: int) -> str:
    """The digest of a run whose last life is left alone."""
    with life(directory, epochs) as process:
        return process.communicate()[0].split()[-1]


def main() -> None:
    """Runs the comparison, or one life of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=Path)
    options = parser.parse_args()
    if options.train:
        print(train(options.train, options.epochs))
        return
    root = Path(tempfile.mkdtemp())
    moments = kill_again_and_again(root / "killed", options.epochs, options.kills, options.seed)
    same = finished(root / "killed", options.epochs) == finished(root / "left", options.epochs)
    shutil.rmtree(root)
    print(f"{moments}: {'equal to the bit' if same else 'NOT equal'}")
    sys.exit(not same)


if __name__ == "__main__":
    main()
