"""A Flax model as a pure function and its parameters.

The parameters are a plain dict of only what an optimizer may update: statistics and random state
are separate arguments and results. A plain dict is also cheapest per step: `jax.jit` flattens it
several times faster than a tree of module objects.

Inference mode is the default for the model, and for each frozen layer in training: a layer that is
not trained has no reason to update its statistics, nor to add noise. The same `wrt` as everywhere
else says which layers are frozen.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import jax
import jax.numpy as jnp

from jaxgrad._functional.statistics import marked
from jaxgrad._text import listed
from jaxgrad._tree.flat import Flat, PyTree, check_same_structure, flatten, is_hole, is_key
from jaxgrad._tree.selection import SelectionError
from jaxgrad._tree.wrt import Wrt, match

if TYPE_CHECKING:
    from flax import linen, nnx
    from flax.linen.module import InterceptorContext

_MODES = ("deterministic", "use_running_average")  # the attributes that hold Flax's mode


class Apply(Protocol):
    """The pure function of a model; see `functional`."""

    @property
    def stats(self) -> PyTree:
        """The model's statistics: a dict, empty if it has none."""
        ...

    def __call__(
        self, params: PyTree, *args: object, stats: PyTree = None, **kwargs: object
    ) -> Any:
        """Returns the model's output in inference mode, with `stats`, by default its own."""
        ...

    def train(
        self,
        params: PyTree,
        *args: object,
        stats: PyTree = None,
        key: jax.Array | None = None,
        **kwargs: object,
    ) -> tuple[Any, PyTree]:
        """Returns the model's output in training mode, and the new statistics."""
        ...


def functional(
    model: "nnx.Module | linen.Module",
    variables: Mapping[str, PyTree] | None = None,
    *,
    wrt: Wrt = "**",
) -> tuple[Apply, PyTree]:
    """Returns a Flax model as a pure function and its parameters.

    Args:
        model: an NNX module, or a Linen module.
        variables: for a Linen module, what `model.init` returned.
        wrt: which parameters are trained; see `select`. A layer without a selected
            parameter stays in inference mode in `apply.train`; a layer without parameters (a
            dropout) follows its nearest parent that has some.

    Returns:
        `(apply, params)`.

        `params` is a dict of arrays (NNX: the `nnx.Param` variables; Linen: the collection
        `params`). Parameters tied in the module are one leaf.

        `apply(params, *args, stats=None, **kwargs)` returns the output in inference mode: no
        dropout, running statistics.

        `apply.train(params, *args, stats=None, key=None, **kwargs)` returns `(output, stats)`, in
        training mode for the layers that `wrt` trains. Pass the new statistics to the next call,
        and a typed PRNG key if the model draws random numbers. A Linen model may have a flag of
        its own (`train=True`), which decides for its trained layers: pass it.

        `apply.stats` are the model's statistics, used if `stats` is not passed.

    Raises:
        TypeError: `model` is not a Flax module, or `variables` are missing.
        SelectionError: see `select`.
        ValueError: on a call, `params` or `stats` have holes or a structure other than the
            model's, or the model draws random numbers and `key` is missing.

    Example:
        >>> import jax, jax.numpy as jnp, jaxgrad as jg
        >>> from flax import nnx
        >>> apply, params = jg.functional(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
        >>> jg.paths(params), jg.paths(apply.stats)
        (['bias', 'scale'], ['mean', 'var'])
        >>> x = jnp.arange(6.0).reshape(2, 3)
        >>> y, stats = apply.train(params, x)
        >>> print(stats["mean"], apply.stats["mean"])
        [0.015 0.025 0.035] [0. 0. 0.]
        >>> y = apply(params, x, stats=stats)

    Source: `torch.func.functional_call`, `Module.train` and `Module.eval`.
    """
    from flax import linen, nnx

    if isinstance(model, nnx.Module):
        return _functional_nnx(model, wrt)
    if not isinstance(model, linen.Module):
        raise TypeError(
            f"functional() takes a Flax module (NNX or Linen), not {type(model).__name__}. An "
            "Equinox module or a dict of arrays is already a pytree of parameters: use it as it is."
        )
    if variables is None or "params" not in variables:
        raise TypeError(
            "functional() of a Linen module needs its variables, including 'params': "
            "functional(model, model.init(key, x))."
        )
    stats = {name: tree for name, tree in variables.items() if name != "params"}
    params = variables["params"]
    return _LinenApply(model, stats, _layer_is_frozen(params, wrt), flatten(params)), params


@dataclasses.dataclass(frozen=True, eq=False)  # by identity, so that jax.jit(apply) works
class _NnxApply:
    """An NNX module in parts. Each call builds a fresh module and drops it again."""

    stats: PyTree
    inference: Any  # the graph definitions in the two modes
    training: Any
    templates: tuple[Flat, Flat, Flat]  # parameters, random state, statistics
    split: Callable[[Any], tuple[Any, Any, Any, Any]]
    is_frozen: Callable[[str], bool]

    def __call__(
        self, params: PyTree, *args: object, stats: PyTree = None, **kwargs: object
    ) -> Any:
        return self._build(self.inference, params, stats, None)(*args, **kwargs)

    def train(
        self,
        params: PyTree,
        *args: object,
        stats: PyTree = None,
        key: jax.Array | None = None,
        **kwargs: object,
    ) -> tuple[Any, PyTree]:
        model = self._build(self.training, params, stats, key)
        before = flatten(self.split(model)[2])
        out = model(*args, **kwargs)
        _, _, random, new_stats = self.split(model)
        if key is None:
            _refuse_draws(before, flatten(random))
        given = flatten(self.stats if stats is None else stats)
        return out, marked(given, _pure(new_stats), self._moves)

    def _moves(self, path: str) -> bool:
        return not self.is_frozen("/".join(path.split("/")[:-1]))

    def _build(
        self, graph: "nnx.GraphDef", params: PyTree, stats: PyTree, key: jax.Array | None
    ) -> Any:
        from flax import nnx

        template, random, stats_template = self.templates
        stats = self.stats if stats is None else stats
        return nnx.merge(
            graph,
            _fill(template, params, "params"),
            random.treedef.unflatten(_reseeded(random.leaves, key)),
            _fill(stats_template, stats, "stats"),
        )


def _functional_nnx(model: "nnx.Module", wrt: Wrt) -> tuple[_NnxApply, PyTree]:
    from flax import nnx

    def split(model: nnx.Module) -> tuple[Any, Any, Any, Any]:
        graph, params, random, stats, _ = nnx.split(
            model, nnx.Param, nnx.RngState, nnx.Not(nnx.Intermediate), ...
        )
        return graph, params, random, stats

    inference, training = nnx.clone(model), nnx.clone(model)
    inference.eval()
    training.train()
    graph, params_state, random, stats = split(inference)
    params = _pure(params_state)
    is_frozen = _layer_is_frozen(params, wrt)
    for path, layer in nnx.iter_modules(training):
        # eval() reaches into the children, which may be trained: set the layer's own mode.
        if is_frozen("/".join(map(str, path))):
            for mode in _MODES:
                if hasattr(layer, mode):
                    setattr(layer, mode, True)
    templates = (flatten(params_state), flatten(random), flatten(stats))
    return _NnxApply(_pure(stats), graph, split(training)[0], templates, split, is_frozen), params


@dataclasses.dataclass(frozen=True, eq=False)  # by identity, so that jax.jit(apply) works
class _LinenApply:
    """A Linen module; the mode of its layers is set as each is called."""

    model: Any
    stats: PyTree
    is_frozen: Callable[[str], bool]
    template: Flat

    def __call__(
        self, params: PyTree, *args: object, stats: PyTree = None, **kwargs: object
    ) -> Any:
        from flax import linen

        with linen.intercept_methods(_in_modes(lambda layer: True)):
            return self.model.apply(self._variables(params, stats), *args, **kwargs)

    def train(
        self,
        params: PyTree,
        *args: object,
        stats: PyTree = None,
        key: jax.Array | None = None,
        **kwargs: object,
    ) -> tuple[Any, PyTree]:
        from flax import errors, linen

        variables = self._variables(params, stats)
        try:
            with linen.intercept_methods(_in_modes(self.is_frozen)):
                out, new_stats = self.model.apply(
                    variables, *args, rngs=key, mutable=list(self.stats), **kwargs
                )
        except errors.InvalidRngError as e:
            raise ValueError(_no_key(str(e).split(" (http")[0])) from e
        given = flatten({name: variables[name] for name in self.stats})
        return out, marked(given, new_stats, self._moves)

    def _moves(self, path: str) -> bool:
        return not self.is_frozen("/".join(path.split("/")[1:-1]))  # without the collection

    def _variables(self, params: PyTree, stats: PyTree) -> dict[str, PyTree]:
        flat = flatten(params)
        check_same_structure(self.template, flat, "the model", "params", ValueError)
        _refuse_holes(self.template, flat, "params")
        return {"params": params, **(self.stats if stats is None else stats)}


def _in_modes(is_frozen: Callable[[str], bool]) -> Callable[..., Any]:
    """An interceptor of Linen calls that puts the frozen layers in inference mode.

    The others are in the mode that the model sets, or in training mode if it sets none.
    """

    def interceptor(
        call: Callable[..., Any], args: tuple, kwargs: dict, context: "InterceptorContext"
    ) -> Any:
        layer = context.module
        modes = [mode for mode in _MODES if hasattr(layer, mode)]
        if not modes:
            return call(*args, **kwargs)
        # The mode comes as an attribute or as an argument, positional or by keyword, and
        # Flax refuses both at once: remove it from the arguments, and set the attribute.
        signature = inspect.signature(getattr(type(layer), context.method_name))
        bound = signature.bind(layer, *args, **kwargs)
        before = {mode: getattr(layer, mode) for mode in modes}
        inference = is_frozen("/".join(layer.path))
        for mode in modes:
            if inference or before[mode] is bound.arguments.get(mode) is None:
                if mode in bound.arguments:
                    bound.arguments[mode] = None
                # Linen freezes its dataclasses; this instance lives for one apply and is restored.
                object.__setattr__(layer, mode, inference)
        try:
            return call(*bound.args[1:], **bound.kwargs)
        finally:
            for mode, value in before.items():
                object.__setattr__(layer, mode, value)

    return interceptor


def _layer_is_frozen(params: PyTree, wrt: Wrt) -> Callable[[str], bool]:
    """Whether the layer at a path trains nothing: by its parameters, or its nearest parent's."""
    flat = flatten(params)
    chosen = dict(zip(flat.paths, match(flat, wrt), strict=True))
    if flat.paths and not any(chosen.values()):
        raise SelectionError(f"wrt={wrt!r} selects no parameter of {listed(flat.paths)}.")

    def is_frozen(layer: str) -> bool:
        parts = layer.split("/") if layer else []
        for depth in range(len(parts), -1, -1):
            node = "".join(part + "/" for part in parts[:depth])
            below = [c for path, c in chosen.items() if path.startswith(node)]
            if below:
                return not any(below)
        return False

    return is_frozen


def _pure(state: PyTree) -> PyTree:
    from flax import nnx

    return nnx.to_pure_dict(state)


def _fill(template: Flat, values: PyTree, name: str) -> Any:
    """The NNX State of a plain dict; both are flattened in the order of their keys."""
    flat = flatten(values)
    if flat.paths != template.paths:
        missing = [f"'{p}'" for p in template.paths if p not in flat.paths]
        extra = [f"'{p}'" for p in flat.paths if p not in template.paths]
        raise ValueError(
            f"{name} does not have the model's structure: "
            + "; ".join(
                f"{what} {listed(names)}"
                for what, names in (("missing", missing), ("unexpected", extra))
                if names
            )
            + "."
        )
    _refuse_holes(template, flat, name)
    return template.treedef.unflatten(flat.leaves)


def _refuse_holes(template: Flat, values: Flat, name: str) -> None:
    holes = [
        f"'{path}'"
        for path, there, value in zip(template.paths, template.leaves, values.leaves, strict=True)
        if is_hole(value) and not is_hole(there)
    ]
    if holes:
        raise ValueError(
            f"{name} has holes at {listed(holes)}: it is one half of a tree. Merge it with the "
            "other, jaxgrad.merge(trainable, frozen), or differentiate with wrt=, which does so."
        )


def _reseeded(leaves: list[Any], key: jax.Array | None) -> list[Any]:
    """Random state derived from `key`: one stream for each of the model's, counting from zero."""
    if key is None:
        return leaves
    return [
        jax.random.split(jax.random.fold_in(key, i), leaf.shape)
        if is_key(leaf)
        else jnp.zeros_like(leaf)
        for i, leaf in enumerate(leaves)
    ]


def _refuse_draws(before: Flat, after: Flat) -> None:
    drawn = [
        f"'{path}'"
        for path, old, new in zip(before.paths, before.leaves, after.leaves, strict=True)
        if old is not new
    ]
    if drawn:
        raise ValueError(_no_key(f"its random state changes at {listed(drawn)}"))


def _no_key(why: str) -> str:
    return (
        f"the model draws random numbers in training mode ({why}) but was not passed a key, so "
        "every call would draw the same ones. Pass apply.train(..., key=jax.random.key(...)), a "
        "new key each step."
    )
