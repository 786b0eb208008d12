"""The classifier that the commands train: its data, its loss, and its way to disk and back."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxgrad as jg
from jaxgrad import data


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A model as its pure function and parameters, and what it takes to build it again."""

    apply: jg.Apply
    params: Any
    config: Mapping[str, Any]

    @classmethod
    def create(cls, hidden: Sequence[int], features: int, classes: int, seed: int) -> "Classifier":
        from flax import nnx

        from jaxgrad.models import MLP

        config = {
            "model": "mlp",
            "hidden": list(hidden),
            "features": int(features),
            "classes": int(classes),
        }
        apply, params = jg.functional(MLP(features, hidden, classes, rngs=nnx.Rngs(seed)))
        return cls(apply, params, config)

    @classmethod
    def load(cls, path: Path) -> "Classifier":
        config = jg.inspect(path).config
        if config.get("model") != "mlp":
            raise jg.CheckpointError(
                f"'{path}' was not saved by `jaxgrad pretrain` or `jaxgrad finetune`, so how to "
                "build its model is not known."
            )
        blank = cls.create(config["hidden"], config["features"], config["classes"], seed=0)
        return dataclasses.replace(blank, params=jg.load(path, into=blank.params))

    def loss(self, params: Any, batch: data.Dataset) -> jax.Array:
        logits = self.apply(params, batch["image"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    def accuracy(self, params: Any, rows: data.Dataset) -> float:
        right = jax.jit(self.apply)(params, jnp.asarray(rows["image"])).argmax(1) == rows["label"]
        return float(np.asarray(right).mean())

    def trained_on(self, rows: data.Dataset) -> None:
        """Refuses rows that the model has no input or no output for."""
        features, top = rows["image"][0].size, int(rows["label"].max())
        if features != self.config["features"] or top >= self.config["classes"]:
            raise data.DataError(
                f"the data has images of {features} pixels and labels up to {top}; the model takes "
                f"{self.config['features']} and tells {self.config['classes']} classes apart."
            )


def splits(path: Path | None, classes: Sequence[int]) -> data.Splits:
    """The embedded digits, or the files that the user names."""
    return data.digits(classes) if path is None else data.mnist(path, classes)


def table(title: str, leaves: Mapping[str, Any], trained: Callable[[str], bool]) -> Any:
    """Paths, shapes, dtypes and bytes, what is trained in bold."""
    from rich.table import Table

    from jaxgrad._messages import nbytes, numel, size

    shown = Table("path", "shape", "dtype", "bytes", "", title=title, title_justify="left")
    shown.columns[1].justify = shown.columns[3].justify = "right"
    total = {True: [0, 0], False: [0, 0]}
    for path, leaf in leaves.items():
        is_trained = trained(path)
        total[is_trained][0] += numel(leaf)
        total[is_trained][1] += nbytes(leaf)
        style = "bold green" if is_trained else "dim"
        shape = " x ".join(map(str, leaf.shape))
        words = "trained" if is_trained else "frozen"
        shown.add_row(path, shape, str(leaf.dtype), size(nbytes(leaf)), words, style=style)
    both = [f"{total[t][0]:,} {w}" for t, w in ((True, "trained"), (False, "frozen"))]
    shown.caption = f"{' and '.join(both)}, {size(total[True][1] + total[False][1])}"
    return shown
