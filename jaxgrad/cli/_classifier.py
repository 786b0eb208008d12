"""The classifier that the commands train: its loss, and how it is saved and loaded."""

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxgrad as jg
from jaxgrad import data
from jaxgrad._checkpoint.arrays import nest
from jaxgrad._checkpoint.record import Json
from jaxgrad._devices.processes import several
from jaxgrad._tree.flat import PyTree, flatten


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A model as a pure function and parameters, with the configuration to rebuild it.

    Attributes:
        apply: the model, always in inference mode, in training too.
        params: its parameters.
        config: how to rebuild the model, as JSON values.
        shape: the shape of one input.
    """

    apply: jg.Apply
    params: PyTree
    config: Mapping[str, Any]
    shape: tuple[int, ...]

    @classmethod
    def create(cls, hidden: Sequence[int], features: int, classes: int, seed: int) -> "Classifier":
        """Builds the MLP of `jaxgrad pretrain`."""
        from flax import nnx

        config = {
            "model": "mlp",
            "hidden": list(hidden),
            "features": int(features),
            "classes": int(classes),
        }
        model = jg.models.MLP(features, hidden, classes, rngs=nnx.Rngs(seed))
        return cls(*jg.functional(model), config, (features,))

    @classmethod
    def from_torch(cls, source: "jg.torch.Checkpoint", forward: Sequence[str]) -> "Classifier":
        """Builds the model of a whole-module file; its inputs are images."""
        apply, params = jg.functional(
            jg.torch.from_module(source, forward=_steps(source, forward) or None)
        )
        shape, classes = _image_shape(apply, params)
        assert source.module is not None  # from_module has checked it
        config = {
            "model": "torch",
            "module": _plain(source.module),
            "forward": list(forward),
            "features": int(np.prod(shape)),
            "classes": classes,
        }
        return cls(apply, params, config, shape)

    @classmethod
    def load(cls, path: Path, forward: Sequence[str] = ()) -> "Classifier":
        """Loads a model that a command saved, or a PyTorch file's."""
        if path.is_file():
            return cls.from_torch(jg.torch.read(path), forward)
        if not path.exists():
            raise FileNotFoundError(
                f"no model at '{path}': make one with `jaxgrad pretrain` or `jaxgrad finetune`, or "
                "pass an existing one by --from."
            )
        info = jg.inspect(path)
        kind = info.config.get("model")
        if kind == "mlp":
            blank = cls.create(
                info.config["hidden"], info.config["features"], info.config["classes"], seed=0
            )
            return dataclasses.replace(blank, params=jg.load(path, into=blank.params))
        if kind != "torch":
            raise jg.CheckpointError(
                f"'{path}' was not saved by `jaxgrad pretrain` or `jaxgrad finetune`, so its "
                "model can't be rebuilt."
            )
        tensors = jg.torch.to_torch(jg.load(path))
        module = _module(info.config["module"])
        source = jg.torch.Checkpoint(path, "orbax", tensors, module=module)
        return cls.from_torch(source, info.config["forward"])

    def save(
        self, path: Path, params: PyTree, trained: Sequence[str], *, overwrite: bool, **record: Json
    ) -> None:
        """Saves parameters, statistics and the configuration that `load` needs."""
        tree = _joined(params, self.apply.stats)
        config = {**self.config, **record}
        moved = (lambda p, _: p in trained) if trained else None
        jg.save(path, tree, trained=moved, config=config, overwrite=overwrite)

    def keep(
        self, path: Path, params: PyTree, trained: Sequence[str], *, overwrite: bool, **record: Json
    ) -> Path:
        """Saves what was trained, in a temporary directory if it can't be saved at `path`.

        Returns:
            The path.

        Raises:
            OSError: it could not be saved at `path`; the message says where it is.
        """
        try:
            self.save(path, params, trained, overwrite=overwrite, **record)
        except (OSError, ValueError) as e:
            if several():
                raise
            spare = Path(tempfile.mkdtemp(prefix="jaxgrad-")) / path.name
            self.save(spare, params, trained, overwrite=False, **record)
            raise OSError(f"--out: {e} The trained model is saved in '{spare}'.") from e
        return path

    def logits(self, params: PyTree, images: jax.Array | np.ndarray) -> jax.Array:
        """The logits of images in any layout with the right number of pixels."""
        return self.apply(params, images.reshape(-1, *self.shape))

    def loss(self, params: PyTree, batch: data.Dataset) -> jax.Array:
        """Mean cross entropy."""
        logits = self.logits(params, batch["image"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    def predict(self, params: PyTree, images: np.ndarray) -> np.ndarray:
        """Probabilities, `float32[rows, classes]`."""
        return np.asarray(jax.nn.softmax(jax.jit(self.logits)(params, jnp.asarray(images))))

    def accuracy(self, params: PyTree, rows: data.Dataset) -> float:
        """The fraction of examples whose most likely class is their label."""
        return float((self.predict(params, rows["image"]).argmax(1) == rows["label"]).mean())

    def check(self, rows: data.Dataset) -> None:
        """Raises if images or labels do not fit the model's inputs or outputs."""
        features, top = rows["image"][0].size, int(rows["label"].max())
        if features != self.config["features"] or top >= self.config["classes"]:
            raise data.DataError(
                f"the data has images of {features} pixels and labels up to {top}; the model takes "
                f"{self.config['features']} and has {self.config['classes']} classes."
            )


def _joined(params: PyTree, stats: PyTree) -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for flat in map(flatten, (params, stats)):
        leaves |= dict(zip(flat.paths, flat.leaves, strict=True))
    return nest(leaves)


def _steps(source: "jg.torch.Checkpoint", forward: Sequence[str]) -> list[Any]:
    """Keeps names of layers, and replaces names of functions of `jax.nn` by the functions."""
    names = source.module.children if source.module else {}
    steps: list[Any] = []
    for name in forward:
        if name.partition(".")[0] in names:
            steps.append(name)
        elif name == "flatten":
            steps.append(jg.torch.Flatten())
        elif hasattr(jax.nn, name):
            steps.append(getattr(jax.nn, name))
        else:
            raise ValueError(
                f"--forward {name}: neither a layer of the module ({', '.join(names)}), nor "
                "flatten, nor a function of jax.nn."
            )
    return steps


def _image_shape(apply: jg.Apply, params: PyTree) -> tuple[tuple[int, ...], int]:
    """The layout in which the model takes a 28 x 28 image, and its number of classes."""
    for shape in ((784,), (28, 28, 1), (28, 28)):
        image = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
        try:
            out = jax.eval_shape(apply, params, image)
        except (TypeError, ValueError):  # a layer refuses an input of the wrong shape
            continue
        if out.ndim == 2 and out.shape[0] == 2:
            return shape, out.shape[1]
    raise data.DataError(
        "the module does not classify images of 28 x 28: it takes neither [rows, 784], nor "
        "[rows, 28, 28, 1], nor [rows, 28, 28], to [rows, classes]."
    )


def _plain(module: "jg.torch.Module") -> dict[str, Any]:
    """The structure of a module as JSON values; `_module` is the inverse."""
    return {
        "cls": module.cls,
        "config": {k: list(v) if isinstance(v, tuple) else v for k, v in module.config.items()},
        "children": {name: _plain(child) for name, child in module.children.items()},
        "parameters": list(module.parameters),
        "buffers": list(module.buffers),
    }


def _module(plain: Mapping[str, Any]) -> "jg.torch.Module":
    return jg.torch.Module(
        plain["cls"],
        {k: tuple(v) if isinstance(v, list) else v for k, v in plain["config"].items()},
        {name: _module(child) for name, child in plain["children"].items()},
        tuple(plain["parameters"]),
        tuple(plain["buffers"]),
    )
