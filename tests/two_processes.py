"""One of the processes of `test_processes.py`: trains, is interrupted, resumes, saves and loads.

    python -m tests.two_processes --processes 2 --process 0 --port 12345 --directory PATH

The processes have four devices between them. The first prints what came of it, as JSON.
"""

import argparse
import json
import os
import signal
from pathlib import Path
from typing import Any


def main() -> None:
    """Runs it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int)
    parser.add_argument("--process", type=int)
    parser.add_argument("--port", type=int)
    parser.add_argument("--directory", type=Path)
    options = parser.parse_args()
    devices = 4 // options.processes
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"

    import grain
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    from jax.sharding import Mesh

    import jaxgrad as jg
    from jaxgrad._devices.processes import whole
    from jaxgrad._staging import min_cut, report

    jax.config.update("jax_numpy_rank_promotion", "raise")
    if options.processes > 1:
        jax.distributed.initialize(f"localhost:{options.port}", options.processes, options.process)
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    params = {"trunk": normal(8, 16), "head": {"w": normal(16, 4), "b": normal(4)}}
    dataset = {"x": normal(86, 8), "y": normal(86, 4)}

    def loss(p: Any, batch: Any) -> jax.Array:
        h = jnp.tanh(batch["x"] @ p["trunk"])
        return jnp.mean((h @ p["head"]["w"] + p["head"]["b"][None] - batch["y"]) ** 2)

    def bits(state: jg.TrainState) -> list[bytes]:
        leaves = jax.tree.leaves((state.params, state.opt_state, state.losses))
        return [whole(x).tobytes() for x in leaves]

    def signalled(state: jg.TrainState) -> None:
        if state.step in (6, 7) and options.process == options.processes - 1:
            signal.raise_signal(signal.SIGTERM)

    # Prices at which even this model is worth staging.
    report._COMPILATION, report._STEP = 0.0, 0.0
    min_cut.FLOPS_PER_BYTE = 1e-6
    # Of each batch of 16 rows, those that are this process's.
    mine = np.arange(80).reshape(5, options.processes, -1)[:, jax.process_index()].ravel()
    examples = [jax.tree.map(lambda x, i=i: x[i], dataset) for i in mine]
    stream = grain.MapDataset.source(examples).batch(16 // options.processes)
    found: dict[str, Any] = {}
    for sharding in ("replicated", "fsdp"):

        def run(wrt: str = "**", dataset: Any = dataset, **more: Any) -> jg.TrainState:
            tx = jg.param_groups({wrt: optax.adam(0.01)})
            settings: Any = {"batch_size": 16, "callback_every": 2, "epochs": 2}
            settings |= {"key": jax.random.key(0), "mesh": Mesh(np.array(jax.devices()), ("data",))}
            return jg.fit(loss, params, dataset, tx, sharding=sharding, **settings, **more)  # noqa: B023

        uninterrupted, result = run(), {}
        directory = options.directory / sharding
        try:
            run(checkpoint=directory, callbacks=[signalled])
        except jg.Interrupted as e:
            result["interrupted"] = [e.state.step, e.signal.name]
        state = run(checkpoint=directory, resume=True)
        result["resumed"] = state.resumed
        result["same bits"] = bits(state) == bits(uninterrupted)
        result["losses"] = state.losses.tolist()
        result["steps"] = sorted(path.name for path in (directory / "steps").iterdir())
        for overwrite in (False, True):
            jg.save(options.directory / f"{sharding}-saved", state.params, overwrite=overwrite)
        loaded = jg.load(options.directory / f"{sharding}-saved", into=params)
        result["loaded"] = jax.tree.all(
            jax.tree.map(lambda a, b: np.array_equal(whole(a), b), state.params, loaded)
        )
        staged = run("head/**")
        result["staged"] = staged.staging.startswith("the frozen part runs once per row")
        result["staged losses"] = staged.losses.tolist()
        streamed, directory = run(dataset=stream), options.directory / f"{sharding}-stream"
        try:
            run(dataset=stream, checkpoint=directory, callbacks=[signalled])
        except jg.Interrupted as e:
            result["stream interrupted"] = e.state.step
        resumed = run(dataset=stream, checkpoint=directory, resume=True)
        result["stream same bits"] = bits(resumed) == bits(streamed)
        result["stream losses"] = streamed.losses.tolist()
        found[sharding] = result
    if jax.process_index() == 0:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
