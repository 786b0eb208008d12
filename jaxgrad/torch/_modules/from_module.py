"""Builds a Flax model from a whole-module file, if the file shows how its layers run.

A pickled module holds its layers and their configuration, but not `forward`, which is the code of
a class. PyTorch's own `Sequential` runs its layers in order, so a tree of those is a program. For
a custom class only the registration order is known. It is taken as the execution order only if
hardly anything else is possible: one chain of sizes that fit, a nonlinear layer between any two
linear maps (otherwise `forward` calls the activations), nothing registered once that may run in
several places, no parameters of its own, and fewer or more features out than in (otherwise it may
add its input to its output). Anything else is refused, and the caller must pass the order.
"""

import functools
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxgrad._text import listed, nearest
from jaxgrad.torch._mapping.load_into import load_into
from jaxgrad.torch._mapping.report import MappingError
from jaxgrad.torch._mapping.rules import Rules
from jaxgrad.torch._mapping.source import Source
from jaxgrad.torch._modules import translate
from jaxgrad.torch._modules.chain import Chain, Layer
from jaxgrad.torch._modules.translate import Flow, Spec
from jaxgrad.torch._reading.module import Module
from jaxgrad.torch._reading.read import Checkpoint, read

Step: TypeAlias = str | Callable[[jax.Array], jax.Array]
Layers: TypeAlias = "dict[str, Layer | Layers]"
_OWN = "torch.nn.modules."
_PASS = 'pass how it runs: forward=("fc1", jax.nn.relu, "fc2", ...)'


def from_module(
    source: Source, *, forward: Sequence[Step] | None = None, rules: Rules = ()
) -> Chain:
    """Builds a Flax NNX model, weights included, from a file that holds a whole PyTorch module.

    Arrays have their channels last: an image model takes (batch, height, width, channels), not
    PyTorch's (batch, channels, height, width), and returns such arrays if its output has spatial
    axes. A model that starts with a Flatten or a Linear takes the same arrays as in PyTorch. The
    model is in inference mode, as after `.eval()`; `model.train()` switches to training.

    The file does not record what the `forward` of a custom class does besides running its layers
    (a reshape at the start, a `log_softmax` at the end): prove the model with `verify`.

    Args:
        source: the file's path, or its `Checkpoint`.
        forward: the names of the root module's layers (`"fc1"`, `"features.0"`), and functions of
            one channels-last array for what `forward` itself calls, in the order in which they
            run. A name may repeat. Required if the file doesn't show the order.
        rules: as in `load_into`.

    Returns:
        A `Chain` whose paths are PyTorch's names: `features.0.weight` is `features/0/kernel`.

    Raises:
        MappingError: the file holds no module or doesn't show how it runs, or a layer has no
            equivalent in Flax.
        TorchFileError: the file can't be read.

    Example:
        >>> import pathlib, numpy as np, jaxgrad as jg
        >>> sizes = {"in_features": 3, "out_features": 2}
        >>> linear = jg.torch.Module("torch.nn.modules.linear.Linear", sizes, {}, ("weight",))
        >>> net = jg.torch.Module("torch.nn.modules.container.Sequential", {}, {"0": linear})
        >>> tensors = {"0.weight": np.ones((2, 3), np.float32)}
        >>> file = jg.torch.Checkpoint(pathlib.Path("net.pt"), "zip", tensors, module=net)
        >>> jg.torch.from_module(file)(np.ones((1, 3), np.float32))
        Array([[3., 3.]], dtype=float32)

    Source: `torch.load(path, weights_only=False).eval()`.
    """
    if isinstance(source, str | os.PathLike):
        source = read(source)
    if not isinstance(source, Checkpoint) or source.module is None:
        raise MappingError(
            "the source holds tensors but no module, so it doesn't show how the model is built: "
            "build the Flax model yourself and use jaxgrad.torch.load_into"
        )
    if source.tied:
        names = listed(map(repr, source.tied[0]))
        raise MappingError(
            f"{names} are one tensor: build the Flax model with one layer in both places and use "
            "jaxgrad.torch.load_into, or they would diverge in training"
        )
    # Flax keeps running statistics in float32, whatever the model's dtype.
    tensors = {
        name: x.astype(np.float32) if name.endswith(("running_mean", "running_var")) else x
        for name, x in source.tensors.items()
    }
    build = functools.partial(_Builder(tensors).root, source.module, forward)
    return load_into(nnx.eval_shape(build), tensors, rules=rules)


class _Builder:
    """Builds chains, and tracks the features that flow between layers."""

    def __init__(self, tensors: Mapping[str, np.ndarray]):
        self.tensors = tensors
        self.rngs = nnx.Rngs(0)

    def root(self, module: Module, forward: Sequence[Step] | None) -> Chain:
        self.rngs = nnx.Rngs(0)
        if forward is not None:
            return self.declared(module, forward)
        layer, _ = self.build("", module, Flow())
        return layer if isinstance(layer, Chain) else Chain({"layer": layer})

    def build(self, path: str, module: Module, flow: Flow) -> tuple[Layer, Flow]:
        if module.cls == f"{_OWN}container.Sequential":
            return self.chain(path, module, flow)
        if module.cls.startswith(f"{_OWN}container."):
            raise _refuse(path, module, f"it has no forward of its own; {_PASS}")
        if module.cls.startswith(_OWN):
            return translate.translate(self.spec(path, module), flow, self.rngs)
        self.check_obvious(path, module)
        return self.chain(path, module, flow)

    def chain(self, path: str, module: Module, flow: Flow) -> tuple[Chain, Flow]:
        layers = {}
        for name, child in module.children.items():
            layers[name], flow = self.build(_join(path, name), child, flow)
        return Chain(layers), flow

    def declared(self, module: Module, forward: Sequence[Step]) -> Chain:
        """A chain in the caller's order; each layer is built when it first runs."""
        layers: Layers = {}
        steps: list[Step] = []
        flow = Flow()
        for i, step in enumerate(forward):
            if isinstance(step, str):
                layer, flow = self.build(step, _find(module, step), flow)
                _put(layers, step, layer)
                steps.append(step)
            elif isinstance(step, nnx.Module):
                layers[f"step_{i}"] = step
                steps.append(f"step_{i}")
                flow = _through(step, flow)
            else:
                steps.append(step)
                flow = _through(step, flow)
        ran = tuple(step for step in steps if isinstance(step, str))
        idle = [
            name
            for name in self.tensors
            if not any(f"{name}.".startswith(f"{step}.") for step in ran)
        ]
        if idle:
            raise MappingError(
                f"forward leaves out the layer of {listed(map(repr, idle))}: name it too"
            )
        return _nested(layers, steps)

    def spec(self, path: str, module: Module) -> Spec:
        weight = self.tensors.get(_join(path, "weight"))
        dtype = np.dtype(np.float32) if weight is None else weight.dtype
        cls = module.cls.rpartition(".")[2]
        return Spec(path, cls, module.config, tuple(module.parameters), dtype)

    def check_obvious(self, path: str, module: Module) -> None:
        """Raises unless the layers of a custom class can run in only one order."""
        if own := [*module.parameters, *module.buffers]:
            raise _refuse(path, module, f"it uses {listed(map(repr, own))} by itself")
        leaves = [self.spec(p, m) for p, m in _leaves(path, module)]
        maps = [i for i, leaf in enumerate(leaves) if translate.is_map(leaf.cls)]
        if not maps:
            raise _refuse(path, module, f"it has no linear or convolutional layer; {_PASS}")
        if translate.is_activation(leaves[0].cls):
            raise _refuse(path, module, f"{leaves[0].path!r} is registered first; {_PASS}")
        for a, b in itertools.pairwise(maps):
            if not any(translate.is_activation(leaf.cls) for leaf in leaves[a:b]):
                raise _refuse(
                    path,
                    module,
                    f"nothing nonlinear is registered between {leaves[a].path!r} and "
                    f"{leaves[b].path!r}, so its forward calls functions or runs a layer twice, "
                    f"which the file doesn't record; {_PASS}",
                )
        pools = [leaf.path for leaf in leaves if translate.is_pooling(leaf.cls)]
        convolutions = [leaf for leaf in leaves if leaf.cls.startswith("Conv")]
        if len(pools) == 1 and len(convolutions) > 1:
            raise _refuse(path, module, f"{pools[0]!r} may run more than once; {_PASS}")
        inputs, outputs = (
            translate.sizes(leaves[maps[0]])[0],
            translate.sizes(leaves[maps[-1]])[1],
        )
        if inputs == outputs:
            raise _refuse(
                path,
                module,
                f"it returns as many features as it takes ({inputs}), so it may add its input to "
                f"its output; {_PASS}",
            )


def _through(function: Callable[[jax.Array], jax.Array], flow: Flow) -> Flow:
    """The flow after a function of the caller, found by tracing it at some shape."""
    if flow.spatial is None:
        return flow
    shape = (1, *(64,) * flow.spatial, flow.features or 64)
    out = jax.eval_shape(function, jax.ShapeDtypeStruct(shape, jnp.float32))
    spatial = len(out.shape) - 2
    # After a flatten, the number of features depends on the 64 that replaces the real size.
    known = flow.features is not None and spatial == flow.spatial
    return Flow(out.shape[-1] if known else None, spatial)


def _leaves(path: str, module: Module) -> list[tuple[str, Module]]:
    if not module.children:
        return [(path, module)]
    return [
        leaf
        for name, child in module.children.items()
        for leaf in _leaves(_join(path, name), child)
    ]


def _find(module: Module, name: str) -> Module:
    found = module
    for part in name.split("."):
        if part not in found.children:
            close = nearest(name, [path for path, _ in _leaves("", module)])
            hint = f"; nearest: {listed(map(repr, close))}" if close else ""
            raise MappingError(f"forward names {name!r}, which the module does not have{hint}")
        found = found.children[part]
    return found


def _put(layers: Layers, name: str, layer: Layer) -> None:
    head, _, rest = name.partition(".")
    there = layers.setdefault(head, {}) if rest else layers.get(head)
    if rest and isinstance(there, dict):
        _put(there, rest, layer)
    elif not rest and isinstance(there, dict):
        raise MappingError(f"forward names {name!r} and layers inside it: choose one")
    else:
        layers.setdefault(head, layer)  # it runs again, or inside a chain that exists


def _nested(layers: Layers, steps: Sequence[Step]) -> Chain:
    made = {k: _nested(v, ()) if isinstance(v, dict) else v for k, v in layers.items()}
    return Chain(made, steps)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _refuse(path: str, module: Module, why: str) -> MappingError:
    where = f"{path!r} ({module.cls})" if path else module.cls
    return MappingError(f"the file doesn't show how {where} runs: {why}")
