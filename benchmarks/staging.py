"""Compares recipes for fine-tuning with frozen layers: the time of an epoch in each.

    python -m benchmarks.staging            # all models; draws benchmarks/staging.svg
    python -m benchmarks.staging mlp --epochs 5

Every recipe trains the same parameters of the same model on the same batches with the same
optimizer (SGD with momentum). Recipes alternate, epoch by epoch, so that other load on the machine
affects all of them; only the ratios matter. The recipes of plain `jax.jit` run an epoch as one
scan, with the data on the device. The first epoch compiles and is not timed. Peak memory is
measured in a separate process for each recipe.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxgrad as jg
from jaxgrad.models import CNN, MLP, ViT

Epoch = Callable[[np.ndarray], float]
"""Trains on the batches of a `[steps, rows]` array of row indices; returns the last loss."""


class Task(NamedTuple):
    """A model, its data, and the parameters to train."""

    model: Callable[[], nnx.Module]
    torch_model: str
    rows: int
    batch: int
    wrt: list[str]


TASKS = {
    "MLP, head": Task(lambda: MLP(rngs=nnx.Rngs(0)), "mlp", 16384, 256, ["head/**"]),
    "CNN, head": Task(lambda: CNN(rngs=nnx.Rngs(0)), "cnn", 8192, 256, ["head/**"]),
    "ViT, last 2 of 12": Task(
        lambda: ViT(width=128, heads=4, rngs=nnx.Rngs(0)),
        "vit",
        4096,
        64,
        ["layers/10/**", "layers/11/**", "norm/**", "head/**"],
    ),
}


class Setting(NamedTuple):
    """Everything that the recipes of a task share."""

    task: Task
    apply: Any
    params: Any
    data: dict[str, np.ndarray]
    loss: Callable[..., jax.Array]

    @property
    def tx(self) -> optax.GradientTransformation:
        return optax.sgd(1e-2, momentum=0.9)

    def batch(self, rows):
        return {name: array[rows] for name, array in self.data.items()}


def setting(task: Task) -> Setting:
    apply, params = jg.functional(task.model())
    draw = np.random.default_rng(0)
    data = {
        "x": draw.normal(size=(task.rows, 28, 28, 1)).astype(np.float32),
        "y": draw.integers(0, 10, task.rows).astype(np.int32),
    }

    def loss(p, batch):
        logits = apply(p, batch["x"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()

    return Setting(task, apply, params, data, loss)


def steps(step: Callable[..., Any], state: Any, batch: Callable[[Any], Any]) -> Epoch:
    """An epoch of `step(state, batch) -> (state, loss)`, one call per batch."""
    box = [state]

    def epoch(order: np.ndarray) -> float:
        value = None
        for rows in order:
            box[0], value = step(box[0], batch(rows))
        return float(jax.block_until_ready(value))

    return epoch


def scanned(step: Callable[..., Any], state: Any, held: Any, data: Any) -> Epoch:
    """An epoch of `step(state, held, batch) -> (state, loss)` as one jitted scan."""

    @partial(jax.jit, donate_argnums=0)
    def run(state, held, data, order):
        def of_rows(state, rows):
            return step(state, held, jax.tree.map(lambda x: x[rows], data))

        return jax.lax.scan(of_rows, state, order)

    box = [jax.tree.map(jnp.copy, state)]
    data = jax.tree.map(jnp.asarray, data)

    def epoch(order: np.ndarray) -> float:
        box[0], values = run(box[0], held, data, order)
        return float(jax.block_until_ready(values)[-1])

    return epoch


def hand_split(s: Setting) -> Epoch:
    trainable, frozen = jg.partition(s.params, s.task.wrt)

    def step(state, frozen, batch):
        p, opt = state
        value, grads = jax.value_and_grad(lambda p: s.loss(jg.merge(p, frozen), batch))(p)
        updates, opt = s.tx.update(grads, opt, p)
        return (optax.apply_updates(p, updates), opt), value

    return scanned(step, (trainable, s.tx.init(trainable)), frozen, s.data)


def optax_partition(s: Setting) -> Epoch:
    mask = jg.select(s.params, s.task.wrt).mask
    labels = jax.tree.map(lambda chosen: "train" if chosen else "freeze", mask)
    tx = optax.partition({"train": s.tx, "freeze": optax.set_to_zero()}, labels)

    def step(state, _, batch):
        p, opt = state
        value, grads = jax.value_and_grad(s.loss)(p, batch)
        updates, opt = tx.update(grads, opt, p)
        return (optax.apply_updates(p, updates), opt), value

    return scanned(step, (s.params, tx.init(s.params)), None, s.data)


def nnx_jit(s: Setting) -> Epoch:
    model = s.task.model()
    model.eval()
    trained = {*jg.select(s.params, s.task.wrt).paths}

    def is_trained(path, value):
        return isinstance(value, nnx.Param) and "/".join(map(str, path)) in trained

    optimizer = nnx.Optimizer(model, s.tx, wrt=is_trained)

    @nnx.jit
    def step(model, optimizer, batch):
        def loss(model):
            logits = model(batch["x"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()

        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, is_trained))(model)
        optimizer.update(model, grads)
        return value

    return steps(lambda _, batch: (None, step(model, optimizer, batch)), None, s.batch)


class Wrapped(eqx.Module):
    """The same function and parameters as an Equinox module."""

    params: Any
    apply: Callable[..., jax.Array] = eqx.field(static=True)

    def __call__(self, x):
        return self.apply(self.params, x)


def equinox(s: Setting) -> Epoch:
    model = Wrapped(s.params, s.apply.__call__)
    mask = Wrapped(jg.select(s.params, s.task.wrt).mask, s.apply.__call__)
    trained, frozen = eqx.partition(model, mask)

    @eqx.filter_jit
    def step(state, batch):
        @eqx.filter_value_and_grad
        def loss(trained):
            logits = eqx.combine(trained, frozen)(batch["x"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()

        trained, opt = state
        value, grads = loss(trained)
        updates, opt = s.tx.update(grads, opt, trained)
        return (eqx.apply_updates(trained, updates), opt), value

    return steps(step, (trained, s.tx.init(trained)), s.batch)


def staged(s: Setting) -> Epoch:
    batch = s.batch(slice(s.task.batch))
    split = jg.stage(s.loss, s.params, batch, s.task.wrt)
    features = split.prepare(s.data, progress=False)
    trainable, _ = jg.partition(s.params, s.task.wrt)

    def step(state, split, features):
        p, opt = state
        value, grads = jax.value_and_grad(split.loss)(p, features)
        updates, opt = s.tx.update(grads, opt, p)
        return (optax.apply_updates(p, updates), opt), value

    return scanned(step, (trainable, s.tx.init(trainable)), split, features)


def cached_by_hand(s: Setting) -> Epoch:
    """Trunk and head, split by someone who knows the model (an MLP)."""
    head, trunk = s.params["head"], s.params["layers"]

    @jax.jit
    def hidden(x):
        x = x.reshape(x.shape[0], -1)
        for i in sorted(trunk):
            x = jax.nn.relu(x @ trunk[i]["kernel"] + trunk[i]["bias"])
        return x

    chunks = [hidden(s.data["x"][i : i + 256]) for i in range(0, s.task.rows, 256)]

    def step(state, _, batch):
        p, opt = state

        def loss(p):
            logits = batch["features"] @ p["kernel"] + p["bias"]
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()

        value, grads = jax.value_and_grad(loss)(p)
        updates, opt = s.tx.update(grads, opt, p)
        return (optax.apply_updates(p, updates), opt), value

    data = {"features": jnp.concatenate(chunks), "y": s.data["y"]}
    return scanned(step, (head, s.tx.init(head)), None, data)


def torch_model(name: str):
    import torch
    from torch import nn

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches = nn.Conv2d(1, 128, 7, 7)
            self.token = nn.Parameter(torch.zeros(1, 1, 128))
            self.positions = nn.Parameter(torch.zeros(1, 17, 128))

        def forward(self, x):
            x = self.patches(x).flatten(2).transpose(1, 2)
            x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
            return x + self.positions

    class First(nn.Module):
        def forward(self, x):
            return x[:, 0]

    if name == "mlp":
        widths = [784, 512, 512, 256]
        layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
        model = nn.Sequential(nn.Flatten(), *layers, nn.Linear(256, 10))
    elif name == "cnn":
        blocks = [
            m
            for a, b in ((1, 32), (32, 64), (64, 128))
            for m in (
                nn.Conv2d(a, b, 3, padding=1, bias=False),
                nn.BatchNorm2d(b),
                nn.ReLU(),
                nn.MaxPool2d(2),
            )
        ]
        pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        model = nn.Sequential(*blocks, *pool, nn.Linear(128, 10)).eval()
    else:
        blocks = [
            nn.TransformerEncoderLayer(128, 4, 512, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(12)
        ]
        model = nn.Sequential(Tokens(), *blocks, First(), nn.LayerNorm(128), nn.Linear(128, 10))
    trained = list(model)[-1:] if name != "vit" else list(model)[-5:]
    model.requires_grad_(False)
    for module in trained:
        module.requires_grad_(True)
    return model


def torch_eager(s: Setting, compiled: bool = False) -> Epoch:
    import torch

    torch.manual_seed(0)
    model = torch_model(s.task.torch_model)
    run = torch.compile(model) if compiled else model
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-2, 0.9)
    x = torch.from_numpy(s.data["x"].transpose(0, 3, 1, 2).copy())
    y = torch.from_numpy(s.data["y"]).long()

    def epoch(order: np.ndarray) -> float:
        value = torch.zeros(())
        for rows in order:
            rows = torch.from_numpy(rows)
            value = torch.nn.functional.cross_entropy(run(x[rows]), y[rows])
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
        return value.item()

    return epoch


RECIPES: dict[str, Callable[[Setting], Epoch]] = {
    "PyTorch eager": torch_eager,
    "torch.compile": lambda s: torch_eager(s, compiled=True),
    "nnx.jit": nnx_jit,
    "Equinox": equinox,
    "optax.partition": optax_partition,
    "split by hand": hand_split,
    "staged": staged,
    "features by hand": cached_by_hand,
}


class Result(NamedTuple):
    """Seconds up to the end of the first epoch, seconds of each later epoch, peak bytes."""

    start: float
    epochs: list[float]
    loss: float
    peak: int


def orders(task: Task, epochs: int) -> list[np.ndarray]:
    draw = np.random.default_rng(1)
    return [draw.permutation(task.rows).reshape(-1, task.batch) for _ in range(epochs)]


def compare(name: str, epochs: int) -> dict[str, Result]:
    task = TASKS[name]
    s, todo = setting(task), orders(task, epochs + 1)
    running: dict[str, tuple[Epoch, float, list[float]]] = {}
    losses: dict[str, float] = {}
    for recipe, make in RECIPES.items():
        if recipe == "features by hand" and task.torch_model != "mlp":
            continue
        start = time.perf_counter()
        try:
            epoch = make(s)
            losses[recipe] = epoch(todo[0])
        except Exception as error:  # torch.compile needs a C++ compiler; torch may be missing
            print(f"{name}: {recipe} does not run here: {str(error).splitlines()[0]}")
            continue
        running[recipe] = (epoch, time.perf_counter() - start, [])
    for order in todo[1:]:
        for recipe, (epoch, _, times) in running.items():
            start = time.perf_counter()
            losses[recipe] = epoch(order)
            times.append(time.perf_counter() - start)
    return {
        recipe: Result(start, times, losses[recipe], peak(name, recipe))
        for recipe, (_, start, times) in running.items()
    }


def peak(name: str, recipe: str) -> int:
    """The peak memory of a process that runs one epoch of one recipe."""
    command = [sys.executable, "-m", "benchmarks.staging", name, "--peak-of", recipe]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def peak_of_this_process() -> int:
    status = Path("/proc/self/status")
    if status.exists():  # on Linux, getrusage reports the parent's peak if it was higher
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def table(name: str, results: dict[str, Result]) -> str:
    base = statistics.median(results["staged"].epochs)
    lines = [
        f"{name} ({TASKS[name].rows} rows, batches of {TASKS[name].batch})",
        f"{'':18}{'epoch':>10}{'to staged':>11}{'first':>10}{'2 epochs':>10}{'peak':>9}  loss",
    ]
    for recipe, r in results.items():
        epoch = statistics.median(r.epochs)
        lines.append(
            f"{recipe:18}{epoch * 1e3:8.1f}ms{epoch / base:10.2f}x{r.start:9.2f}s"
            f"{r.start + r.epochs[0]:9.2f}s{r.peak / 1e6:7.0f}MB  {r.loss:.6f}"
        )
    return "\n".join(lines)


def chart(all_results: dict[str, dict[str, Result]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "jaxgrad"
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(all_results), figsize=(4 * len(all_results), 2.8))
    for ax, (name, results) in zip(np.atleast_1d(axes), all_results.items(), strict=True):
        shown = [r for r in results if r != "features by hand"]
        base = statistics.median(results["staged"].epochs)
        ratios = [statistics.median(results[r].epochs) / base for r in shown]
        colors = ["#d1495b" if r == "staged" else "#8d99ae" for r in shown]
        bars = ax.barh(shown, ratios, color=colors)
        ax.bar_label(bars, [f"{r:.1f}" for r in ratios], padding=3)
        ax.set_title(f"{name} trained", fontsize=10)
        ax.set_xlim(0, max(ratios) * 1.2)
        ax.invert_yaxis()
        ax.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("time of an epoch, staged = 1", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", nargs="*", help=f"{'; '.join(TASKS)} (first letters suffice)")
    parser.add_argument("--epochs", type=int, default=5, help="timed epochs of each recipe")
    parser.add_argument("--peak-of", help="run one epoch of a recipe and print its peak memory")
    parser.add_argument("--chart", type=Path, default=Path(__file__).with_suffix(".svg"))
    args = parser.parse_args()
    starts = tuple(map(str.lower, args.task)) or ("",)
    names = [n for n in TASKS if n.lower().startswith(starts)]
    if args.peak_of:
        RECIPES[args.peak_of](setting(TASKS[names[0]]))(orders(TASKS[names[0]], 1)[0])
        print(peak_of_this_process())
        return
    results = {}
    for name in names:
        results[name] = compare(name, args.epochs)
        print(table(name, results[name]), end="\n\n", flush=True)
    if len(results) == len(TASKS):
        chart(results, args.chart)


if __name__ == "__main__":
    main()
