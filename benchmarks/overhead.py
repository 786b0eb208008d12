"""Overhead of a training step beyond its arithmetic: a small MLP, one example, the head trained.

    python -m benchmarks.overhead

Every library runs the same head-only SGD step. They alternate, so that other load on the machine
affects all of them equally. The report has the median time of a step, as a ratio to `jax.jit` over
a dict split by hand. PyTorch and Equinox are skipped if they are not installed. The last line
compares complete processes: `import jaxgrad` against `import jax, optax`.
"""

import argparse
import importlib.util
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import jaxgrad as jg
from jaxgrad.models import MLP

WIDTHS = (32, 32, 32)
TX = optax.sgd(1e-2, momentum=0.9)
BATCH = {"x": jnp.ones((1, 32)), "y": jnp.zeros(1, jnp.int32)}

Step = Callable[[], object]  # one training step; block on its result


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def by_hand() -> Step:
    apply, params = jg.functional(MLP(32, WIDTHS, 10, rngs=nnx.Rngs(0)))
    head, trunk = params["head"], {"layers": params["layers"]}
    state = TX.init(head)

    @jax.jit
    def step(head, trunk, state, batch):
        def loss(head):
            return cross_entropy(apply({"head": head, **trunk}, batch["x"]), batch["y"])

        value, grads = jax.value_and_grad(loss)(head)
        updates, state = TX.update(grads, state, head)
        return optax.apply_updates(head, updates), state, value

    def run():
        nonlocal head, state
        head, state, value = step(head, trunk, state, BATCH)
        return value

    return run


def jaxgrad() -> Step:
    apply, params = jg.functional(MLP(32, WIDTHS, 10, rngs=nnx.Rngs(0)))
    tx = jg.param_groups({"head/**": TX})
    state = tx.init(jg.partition(params, "head/**")[0])
    grad = jg.value_and_grad(lambda p, b: cross_entropy(apply(p, b["x"]), b["y"]), wrt="head/**")

    @jax.jit
    def step(trainable, frozen, state, batch):
        value, grads = grad(jg.merge(trainable, frozen), batch)
        updates, state = tx.update(grads, state, trainable)
        return jg.apply_updates(trainable, updates), state, value

    trainable, frozen = jg.partition(params, "head/**")

    def run():
        nonlocal trainable, state
        trainable, state, value = step(trainable, frozen, state, BATCH)
        return value

    return run


def nnx_jit() -> Step:
    model = MLP(32, WIDTHS, 10, rngs=nnx.Rngs(0))
    wrt = nnx.All(nnx.Param, nnx.PathContains("head"))
    optimizer = nnx.Optimizer(model, TX, wrt=wrt)

    def loss(model, batch):
        return cross_entropy(model(batch["x"]), batch["y"])

    @nnx.jit
    def step(model, optimizer, batch):
        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, wrt))(model, batch)
        optimizer.update(model, grads)
        return value

    return lambda: step(model, optimizer, BATCH)


def equinox() -> Step:
    import equinox as eqx

    model: Any = eqx.nn.MLP(32, 10, 32, 3, key=jax.random.key(0))
    mask = jax.tree.map(lambda _: False, model)
    mask = eqx.tree_at(lambda m: (m.layers[-1].weight, m.layers[-1].bias), mask, (True, True))
    state: Any = TX.init(eqx.filter(model, mask))

    def loss(trainable, frozen, batch):
        return cross_entropy(jax.vmap(eqx.combine(trainable, frozen))(batch["x"]), batch["y"])

    @eqx.filter_jit
    def train_step(model, state, batch):
        trainable, frozen = eqx.partition(model, mask)
        value, grads = eqx.filter_value_and_grad(loss)(trainable, frozen, batch)
        updates, state = TX.update(grads, state, trainable)
        return eqx.apply_updates(model, updates), state, value

    def run():
        nonlocal model, state
        model, state, value = train_step(model, state, BATCH)
        return value

    return run


def pytorch() -> Step:
    import torch

    sizes = (32, *WIDTHS)
    layers = [
        m
        for a, b in zip(sizes, WIDTHS, strict=False)
        for m in (torch.nn.Linear(a, b), torch.nn.ReLU())
    ]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(32, 10))
    model[:-1].requires_grad_(False)
    optimizer = torch.optim.SGD(model[-1].parameters(), lr=1e-2, momentum=0.9)
    x, y = torch.ones(1, 32), torch.zeros(1, dtype=torch.long)

    def run():
        loss = torch.nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return jnp.zeros(())

    return run


def medians(steps: dict[str, Step], rounds: int, inner: int) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        for _ in range(20):
            jax.block_until_ready(step())
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            for _ in range(inner):
                jax.block_until_ready(step())
            times[name].append((time.perf_counter() - start) / inner)
    return {name: statistics.median(t) for name, t in times.items()}


def import_ratio(rounds: int) -> float:
    times: dict[str, list[float]] = {"import jax, optax": [], "import jaxgrad": []}
    for _ in range(rounds):
        for code in times:
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True)
            times[code].append(time.perf_counter() - start)
    base, ours = (statistics.median(t) for t in times.values())
    return ours / base


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=40, help="rounds over all libraries")
    parser.add_argument("--inner", type=int, default=50, help="steps of each library in a round")
    args = parser.parse_args()
    makers = {"jax.jit over a dict, by hand": by_hand, "jaxgrad": jaxgrad, "nnx.jit": nnx_jit}
    if importlib.util.find_spec("equinox"):
        makers["Equinox filter_jit"] = equinox
    if importlib.util.find_spec("torch"):
        makers["PyTorch eager"] = pytorch
    times = medians({name: make() for name, make in makers.items()}, args.rounds, args.inner)
    base = times["jax.jit over a dict, by hand"]
    print(f"one head-only step at batch 1, on {jax.devices()[0].device_kind}")
    for name, seconds in times.items():
        print(f"  {name:30} {seconds / base:6.2f} x   ({seconds * 1e6:.0f} us)")
    print(f"import jaxgrad: {import_ratio(9):.2f} x `import jax, optax`, complete process")


if __name__ == "__main__":
    main()
