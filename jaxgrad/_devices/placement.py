"""Places leaves on one device, or on a mesh.

Data parallel, fully sharded and tensor parallel training run the same jitted steps. They differ in
the placement of the arrays, by which XLA divides the work, so a placement is all that `fit` needs
to know about a mesh. It goes by path: an array is placed like the parameter of the same shape whose
path is a suffix of the array's. Optimizer state and the arrays of a checkpoint thus follow their
parameters, and everything else (a counter, the losses) is on every device.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from jax.typing import ArrayLike

from jaxgrad._text import spec
from jaxgrad._tree.flat import PyTree, flatten, is_array, is_key, is_number
from jaxgrad._tree.selection import SelectionError
from jaxgrad._tree.wrt import match

Rules: TypeAlias = Literal["replicated", "fsdp"] | Mapping[str, PartitionSpec]
ShardingOf: TypeAlias = Callable[[str, tuple[int, ...]], jax.sharding.Sharding]
"""Maps the path and the shape of an array to its sharding."""


def on_one_device(path: str, shape: tuple[int, ...]) -> jax.sharding.Sharding:
    """The sharding of an array without a mesh."""
    return SingleDeviceSharding(jax.local_devices()[0])


class OneDevice:
    """Everything on one device."""

    sharding_of: ShardingOf = staticmethod(on_one_device)

    def put(self, tree: PyTree) -> PyTree:
        """Places the arrays of a tree."""
        return jax.tree.map(lambda x: jnp.asarray(x) if is_array(x) else x, tree)

    def init(self, tx: optax.GradientTransformation, trainable: PyTree) -> PyTree:
        """The first state of an optimizer."""
        state = tx.init(trainable)
        return jax.tree.map(lambda x: jnp.asarray(x) if is_number(x) else x, state)

    def pinned(self, carry: PyTree) -> Any:
        """The output shardings of the jitted steps: of the carry, and of what they record."""
        return None

    def rows(self, count: int) -> NamedSharding | None:
        """The sharding of this many rows, if it matters."""
        return None

    def check_batch(self, batch_size: int) -> None:
        """Nothing: one device takes batches of any size."""


class OnMesh:
    """Parameters by rules, rows split over one axis of the mesh.

    Args:
        mesh: the devices.
        sharding: how the parameters are placed; see `fit`.
        params: the parameters.

    Raises:
        SelectionError: a pattern of the rules matches no leaf.
        ValueError: a rule does not fit the mesh or the shape of a leaf, or Explicit axes are set.
    """

    def __init__(self, mesh: Mesh, sharding: Rules, params: PyTree) -> None:
        # With Explicit axes the model's code would have to name them; with Auto axes it runs
        # unchanged.
        if AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types:
            raise ValueError(
                "jax.set_mesh has set a mesh with Explicit axes, under which models do not run "
                "unchanged. Call fit outside of it; the same mesh may be passed to fit."
            )
        self.mesh = Mesh(mesh.devices, mesh.axis_names)
        self.axis = "data" if "data" in mesh.axis_names else mesh.axis_names[0]
        self.ways = mesh.shape[self.axis]
        self.everywhere = NamedSharding(self.mesh, PartitionSpec())
        flat = flatten(params)
        if sharding == "replicated":
            specs = [PartitionSpec()] * len(flat.leaves)
        elif sharding == "fsdp":
            specs = [self._split(np.shape(leaf)) for leaf in flat.leaves]
        elif isinstance(sharding, Mapping):
            specs = self._by_rules(sharding, params)
        else:
            raise ValueError(
                f"sharding={sharding!r}; it must be 'replicated', 'fsdp', or a mapping from "
                "patterns of paths to PartitionSpecs."
            )
        self._table = {
            path: (np.shape(leaf), NamedSharding(self.mesh, p))
            for path, leaf, p in zip(flat.paths, flat.leaves, specs, strict=True)
            if is_array(leaf)
        }

    def sharding_of(self, path: str, shape: tuple[int, ...]) -> NamedSharding:
        """The sharding of an array."""
        parts = path.split("/")
        for start in range(len(parts) + 1):
            found, sharding = self._table.get("/".join(parts[start:]), (None, self.everywhere))
            if found == shape:
                return sharding
        return self.everywhere

    def put(self, tree: PyTree) -> PyTree:
        """Places the arrays of a tree."""
        flat = flatten(tree)
        return flat.treedef.unflatten(
            [
                _put(x, self.sharding_of(p, np.shape(x))) if is_array(x) else x
                for p, x in zip(flat.paths, flat.leaves, strict=True)
            ]
        )

    def init(self, tx: optax.GradientTransformation, trainable: PyTree) -> PyTree:
        """The first state of an optimizer, sharded like its parameters from the start."""
        flat = flatten(jax.eval_shape(tx.init, trainable))
        shardings = flat.treedef.unflatten(
            [
                self.sharding_of(p, x.shape) if is_array(x) else x
                for p, x in zip(flat.paths, flat.leaves, strict=True)
            ]
        )
        return jax.jit(tx.init, out_shardings=shardings)(trainable)

    def pinned(self, carry: PyTree) -> Any:
        """The output shardings of the jitted steps: of the carry, and of what they record.

        XLA might choose others, and the next call would compile again.
        """
        return jax.tree.map(lambda x: x.sharding, carry), self.everywhere

    def rows(self, count: int) -> NamedSharding:
        """The sharding of this many rows: split, or replicated if they don't divide."""
        split = PartitionSpec(self.axis) if count % self.ways == 0 else PartitionSpec()
        return NamedSharding(self.mesh, split)

    def check_batch(self, batch_size: int) -> None:
        """Raises if a batch can't be split."""
        if batch_size % self.ways:
            raise ValueError(
                f"batch_size={batch_size} can't be split over the {self.ways} devices of the mesh "
                f"axis '{self.axis}'. Choose a multiple of {self.ways}."
            )

    def _split(self, shape: tuple[int, ...]) -> PartitionSpec:
        """Splits the longest axis that divides, as ZeRO and FSDP do."""
        axes = [i for i, n in enumerate(shape) if n and n % self.ways == 0]
        longest = max(axes, key=lambda i: shape[i], default=-1)
        return PartitionSpec(*[self.axis if i == longest else None for i in range(len(shape))])

    def _by_rules(self, rules: Mapping[str, PartitionSpec], params: PyTree) -> list[PartitionSpec]:
        flat = flatten(params)
        found: list[PartitionSpec | None] = [None] * len(flat.leaves)
        for pattern, p in rules.items():
            if not isinstance(p, PartitionSpec):
                raise ValueError(
                    f"the sharding rule '{pattern}' is {p!r}; it must be a "
                    "jax.sharding.PartitionSpec."
                )
            try:
                taken = match(flat, pattern)
            except SelectionError as e:
                raise SelectionError(str(e).replace("wrt pattern", "sharding pattern", 1)) from None
            for i, take in enumerate(taken):
                if take and found[i] is None:
                    self._check(pattern, p, flat.paths[i], flat.leaves[i])
                    found[i] = p
        return [PartitionSpec() if p is None else p for p in found]

    def _check(self, pattern: str, p: PartitionSpec, path: str, leaf: ArrayLike) -> None:
        where = f"the sharding rule '{pattern}': {p} does not fit '{path}', {spec(leaf)}: "
        shape = np.shape(leaf)
        if len(p) > len(shape):
            raise ValueError(f"{where}it has {len(p)} entries and the leaf has {len(shape)} axes.")
        for length, names in zip(shape, p, strict=False):
            names = (names,) if isinstance(names, str) else names or ()
            if unknown := [name for name in names if name not in self.mesh.shape]:
                raise ValueError(
                    f"{where}the mesh has no axis {unknown[0]!r}; it has "
                    f"{', '.join(map(repr, self.mesh.axis_names))}."
                )
            ways = math.prod(self.mesh.shape[name] for name in names)
            if length % ways:
                raise ValueError(f"{where}an axis of {length} can't be split over {ways} devices.")


Placement: TypeAlias = OneDevice | OnMesh


def placement(mesh: Mesh | None, sharding: Rules, params: PyTree) -> Placement:
    """The placement that the arguments of `fit` describe."""
    if mesh is None:
        if sharding != "replicated":
            raise ValueError(
                f"sharding={sharding!r} needs the devices: fit(..., mesh=jax.sharding.Mesh("
                "jax.devices(), ('data',)))."
            )
        return OneDevice()
    return OnMesh(mesh, sharding, params)


def _put(x: ArrayLike, sharding: NamedSharding) -> jax.Array:
    if is_key(x):
        data = _put(jax.random.key_data(x), NamedSharding(sharding.mesh, PartitionSpec()))
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    x = x if hasattr(x, "dtype") else jnp.asarray(x)
    if isinstance(x, jax.Array) and x.is_fully_addressable and not sharding.is_fully_addressable:
        x = np.asarray(x)  # local to this process, with the same value in all of them
    return jax.device_put(x, sharding)
