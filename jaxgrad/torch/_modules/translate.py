"""Translates the configuration of a PyTorch layer into a Flax layer, without its weights.

A translation knows the layer's input (`Flow`): PyTorch puts channels first and Flax last, so the
meaning of an axis number depends on whether there are spatial axes. What Flax's layer cannot do is
refused by name, never approximated.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxgrad.torch._mapping.report import MappingError
from jaxgrad.torch._modules.chain import Flatten, Layer

Setting: TypeAlias = bool | int | float | str | tuple[int, ...] | None
Activation: TypeAlias = Callable[[jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Flow:
    """The features that flow between two layers.

    Attributes:
        features: the number of channels or features; None if unknown.
        spatial: the number of spatial axes; 0 if PyTorch has the features last too; None until a
            layer determines it.
    """

    features: int | None = None
    spatial: int | None = None

    @property
    def is_start(self) -> bool:
        return self == Flow()


@dataclasses.dataclass(frozen=True)
class Spec:
    """A layer of the file: its path, class (without package), configuration and parameters."""

    path: str
    cls: str
    config: Mapping[str, Any]
    parameters: tuple[str, ...]
    dtype: np.dtype

    def refuse(self, why: str) -> MappingError:
        return MappingError(f"{self.path!r} ({self.cls}): {why}")

    def only(self, **values: Setting) -> None:
        """Refuses a configuration that differs from the given values."""
        for key, value in values.items():
            if (found := self.config.get(key, value)) != value:
                raise self.refuse(f"{key}={found!r} has no equivalent in Flax, only {value!r} has")


def translate(spec: Spec, flow: Flow, rngs: nnx.Rngs) -> tuple[Layer, Flow]:
    """The Flax layer, a module or a function of one array, and the flow out of it.

    Raises:
        MappingError: the layer, or this configuration of it, has no translation.
    """
    if spec.cls in _ACTIVATIONS:
        return _ACTIVATIONS[spec.cls](spec), flow
    if spec.cls not in _LAYERS:
        known = ", ".join(sorted([*_LAYERS, *_ACTIVATIONS]))
        raise spec.refuse(
            "no translation to Flax. Build the Flax model yourself and use "
            f"jaxgrad.torch.load_into. Supported are {known}"
        )
    return _LAYERS[spec.cls](spec, flow, rngs)


def is_map(cls: str) -> bool:
    """Whether a layer is a linear map: two in a row, with nothing between, make no sense."""
    return cls == "Linear" or cls.startswith("Conv")


def is_activation(cls: str) -> bool:
    """Whether a layer is a nonlinear function of each element."""
    return cls in _ACTIVATIONS and cls != "Identity"


def is_pooling(cls: str) -> bool:
    """Whether a layer pools; it has no parameters, so a model may run it in several places."""
    return "Pool" in cls


def sizes(spec: Spec) -> tuple[int, int]:
    """The numbers of input and output features of a linear map."""
    config = spec.config
    if spec.cls == "Linear":
        return config["in_features"], config["out_features"]
    return config["in_channels"], config["out_channels"]


def _linear(spec: Spec, flow: Flow, rngs: nnx.Rngs) -> tuple[Layer, Flow]:
    inputs, outputs = sizes(spec)
    if flow.spatial:
        raise spec.refuse(
            "runs over features with spatial axes: PyTorch would take the last axis for the "
            "features. A Flatten is missing, or is in a forward that the file doesn't record: name "
            "the layers in forward=, with a jaxgrad.torch.Flatten() among them"
        )
    _check_features(spec, flow, inputs)
    bias = "bias" in spec.parameters
    layer = nnx.Linear(inputs, outputs, use_bias=bias, param_dtype=spec.dtype, rngs=rngs)
    return layer, Flow(outputs, 0)


def _conv(spec: Spec, flow: Flow, rngs: nnx.Rngs) -> tuple[Layer, Flow]:
    inputs, outputs = sizes(spec)
    n = int(spec.cls[-2])
    _check_features(spec, flow, inputs)
    _check_spatial(spec, flow, n)
    spec.only(padding_mode="zeros")
    config = spec.config
    kernel, dilation = _each(config["kernel_size"], n), _each(config.get("dilation", 1), n)
    padding = config.get("padding", 0)
    if padding == "valid":
        padding = 0
    if padding == "same":
        # If the sum is odd, both libraries pad the same side by one more.
        total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        pads = [(t // 2, t - t // 2) for t in total]
    else:
        pads = [(p, p) for p in _each(padding, n)]
    layer = nnx.Conv(
        inputs,
        outputs,
        kernel,
        _each(config.get("stride", 1), n),
        padding=pads,
        kernel_dilation=dilation,
        feature_group_count=config.get("groups", 1),
        use_bias="bias" in spec.parameters,
        param_dtype=spec.dtype,
        rngs=rngs,
    )
    return layer, Flow(outputs, n)


def _conv_transpose(spec: Spec, flow: Flow, rngs: nnx.Rngs) -> tuple[Layer, Flow]:
    inputs, outputs = sizes(spec)
    n = int(spec.cls[-2])
    _check_features(spec, flow, inputs)
    _check_spatial(spec, flow, n)
    spec.only(padding_mode="zeros", groups=1)
    config = spec.config
    kernel, dilation = _each(config["kernel_size"], n), _each(config.get("dilation", 1), n)
    padding, extra = _each(config.get("padding", 0), n), _each(config.get("output_padding", 0), n)
    # PyTorch crops the full output by `padding`; Flax pads the dilated input up to it.
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    layer = nnx.ConvTranspose(
        inputs,
        outputs,
        kernel,
        _each(config.get("stride", 1), n),
        padding=[(r - p, r - p + e) for r, p, e in zip(reach, padding, extra, strict=True)],
        kernel_dilation=dilation,
        use_bias="bias" in spec.parameters,
        transpose_kernel=True,
        param_dtype=spec.dtype,
        rngs=rngs,
    )
    return layer, Flow(outputs, n)


def _batch_norm(spec: Spec, flow: Flow, rngs: nnx.Rngs) -> tuple[Layer, Flow]:
    spec.only(track_running_stats=True)
    features, momentum = spec.config["num_features"], spec.config.get("momentum", 0.1)
    _check_features(spec, flow, features)
    if momentum is None:
        raise spec.refuse("momentum=None, a cumulative average, has no equivalent in Flax")
    n = int(spec.cls[-2])
    if n > 1:
        _check_spatial(spec, flow, n)
    affine = "weight" in spec.parameters
    layer = nnx.BatchNorm(
        features,
        use_running_average=True,
        momentum=1 - momentum,
        epsilon=spec.config.get("eps", 1e-5),
        use_bias=affine,
        use_scale=affine,
        use_fast_variance=False,
        param_dtype=spec.dtype,
        rngs=rngs,
    )
    return layer, Flow(features, n if n > 1 else flow.spatial)


def _layer_norm(spec: Spec, flow: Flow, rngs: nnx.Rngs) -> tuple[Layer, Flow]:
    shape = spec.config["normalized_shape"]
    features, *others = (shape,) if isinstance(shape, int) else shape
    if others or flow.spatial:
        raise spec.refuse(
            f"normalises over {shape} of channels-first features; Flax normalises over "
            "the last axis"
        )
    _check_features(spec, flow, features)
    layer = nnx.LayerNorm(
        features,
        epsilon=spec.config.get("eps", 1e-5),
        use_bias="bias" in spec.parameters,
        use_scale="weight" in spec.parameters,
        use_fast_variance=False,
        param_dtype=spec.dtype,
        rngs=rngs,
    )
    return layer, Flow(features, 0)


def _group_norm(spec: Spec, flow: Flow, rngs: nnx.Rngs) -> tuple[Layer, Flow]:
    channels = spec.config["num_channels"]
    _check_features(spec, flow, channels)
    affine = "weight" in spec.parameters
    layer = nnx.GroupNorm(
        channels,
        num_groups=spec.config["num_groups"],
        epsilon=spec.config.get("eps", 1e-5),
        use_bias=affine,
        use_scale=affine,
        use_fast_variance=False,
        param_dtype=spec.dtype,
        rngs=rngs,
    )
    return layer, Flow(channels, flow.spatial)


def _embedding(spec: Spec, flow: Flow, rngs: nnx.Rngs) -> tuple[Layer, Flow]:
    if not flow.is_start:
        raise spec.refuse("takes the output of another layer, which is not an index")
    spec.only(max_norm=None)
    rows, features = spec.config["num_embeddings"], spec.config["embedding_dim"]
    return nnx.Embed(rows, features, param_dtype=spec.dtype, rngs=rngs), Flow(features, 0)


def _dropout(spec: Spec, flow: Flow, rngs: nnx.Rngs) -> tuple[Layer, Flow]:
    axes = tuple(range(1, 1 + int(spec.cls[-2]))) if spec.cls[-1] == "d" else ()
    return nnx.Dropout(spec.config.get("p", 0.5), broadcast_dims=axes, deterministic=True), flow


def _flatten(spec: Spec, flow: Flow, rngs: nnx.Rngs) -> tuple[Layer, Flow]:
    spec.only(start_dim=1, end_dim=-1)
    if flow.is_start or flow.spatial == 0:
        return _flatten_last, Flow(None, 0)
    if flow.spatial is None:
        raise spec.refuse("it is unknown whether there are spatial axes to flatten")
    return Flatten(), Flow(None, 0)


def _flatten_last(x: jax.Array) -> jax.Array:
    return x.reshape(x.shape[0], -1)


def _pool(spec: Spec, flow: Flow, rngs: nnx.Rngs) -> tuple[Layer, Flow]:
    n = int(spec.cls[-2])
    _check_spatial(spec, flow, n)
    spec.only(ceil_mode=False, dilation=1, return_indices=False, divisor_override=None)
    config = spec.config
    window = _each(config["kernel_size"], n)
    strides = _each(config.get("stride") or config["kernel_size"], n)
    pads = [(p, p) for p in _each(config.get("padding", 0), n)]
    sizes = {"window": window, "strides": strides, "padding": pads}
    if spec.cls.startswith("Max"):
        return functools.partial(_maximum, **sizes), Flow(flow.features, n)
    counted = config.get("count_include_pad", True)
    return functools.partial(_average, **sizes, counted=counted), Flow(flow.features, n)


def _maximum(
    x: jax.Array,
    *,
    window: tuple[int, ...],
    strides: tuple[int, ...],
    padding: list[tuple[int, int]],
) -> jax.Array:
    return nnx.pool(x, -jnp.inf, jax.lax.max, window, strides, padding)


def _average(
    x: jax.Array,
    *,
    window: tuple[int, ...],
    strides: tuple[int, ...],
    padding: list[tuple[int, int]],
    counted: bool,
) -> jax.Array:
    # Flax's own divides by an integer, which strict dtype promotion refuses.
    total = nnx.pool(x, 0.0, jax.lax.add, window, strides, padding)
    if counted:
        return total / math.prod(window)
    return total / nnx.pool(jnp.ones_like(x), 0.0, jax.lax.add, window, strides, padding)


def _global_pool(spec: Spec, flow: Flow, rngs: nnx.Rngs) -> tuple[Layer, Flow]:
    n = int(spec.cls[-2])
    _check_spatial(spec, flow, n)
    if (size := _each(spec.config["output_size"], n)) != (1,) * n:
        raise spec.refuse(f"output_size={size} has no equivalent in Flax, only 1 has")
    reduce = jnp.mean if "Avg" in spec.cls else jnp.max
    layer = functools.partial(reduce, axis=tuple(range(1, n + 1)), keepdims=True)
    return layer, Flow(flow.features, n)


def _softmax(spec: Spec, flow: Flow, rngs: nnx.Rngs) -> tuple[Layer, Flow]:
    dim = spec.config.get("dim")
    if dim is None:
        raise spec.refuse("dim=None lets PyTorch choose an axis by the rank of its input")
    if flow.spatial:
        dim %= flow.spatial + 2
        dim = {0: 0, 1: -1}.get(dim, dim - 1)
    function = jax.nn.softmax if spec.cls == "Softmax" else jax.nn.log_softmax
    return functools.partial(function, axis=dim), flow


def _check_features(spec: Spec, flow: Flow, inputs: int) -> None:
    if flow.features is not None and flow.features != inputs:
        raise spec.refuse(f"takes {inputs} features, but the layer before returns {flow.features}")


def _check_spatial(spec: Spec, flow: Flow, n: int) -> None:
    if flow.spatial is not None and flow.spatial != n:
        raise spec.refuse(f"takes {n} spatial axes, but the layer before returns {flow.spatial}")


def _each(value: int | Sequence[int], n: int) -> tuple[int, ...]:
    return (value,) * n if isinstance(value, int) else tuple(value)


def _identity(x: jax.Array) -> jax.Array:
    return x


def _plain(function: Activation) -> Callable[[Spec], Activation]:
    return lambda spec: function


def _gelu(spec: Spec) -> Activation:
    return functools.partial(jax.nn.gelu, approximate=spec.config.get("approximate") == "tanh")


def _leaky_relu(spec: Spec) -> Activation:
    slope = spec.config.get("negative_slope", 0.01)
    return functools.partial(jax.nn.leaky_relu, negative_slope=slope)


def _elu(spec: Spec) -> Activation:
    return functools.partial(jax.nn.elu, alpha=spec.config.get("alpha", 1.0))


def _celu(spec: Spec) -> Activation:
    return functools.partial(jax.nn.celu, alpha=spec.config.get("alpha", 1.0))


def _hardtanh(spec: Spec) -> Activation:
    low, high = spec.config.get("min_val", -1.0), spec.config.get("max_val", 1.0)
    return functools.partial(jnp.clip, min=low, max=high)


def _softplus(spec: Spec) -> Activation:
    spec.only(beta=1, threshold=20)
    return jax.nn.softplus


_ACTIVATIONS: dict[str, Callable[[Spec], Activation]] = {
    "Identity": _plain(_identity),
    "ReLU": _plain(jax.nn.relu),
    "ReLU6": _plain(jax.nn.relu6),
    "SELU": _plain(jax.nn.selu),
    "SiLU": _plain(jax.nn.silu),
    "Mish": _plain(jax.nn.mish),
    "Tanh": _plain(jnp.tanh),
    "Sigmoid": _plain(jax.nn.sigmoid),
    "LogSigmoid": _plain(jax.nn.log_sigmoid),
    "Softsign": _plain(jax.nn.soft_sign),
    "Hardswish": _plain(jax.nn.hard_swish),
    "Hardsigmoid": _plain(jax.nn.hard_sigmoid),
    "GELU": _gelu,
    "LeakyReLU": _leaky_relu,
    "ELU": _elu,
    "CELU": _celu,
    "Hardtanh": _hardtanh,
    "Softplus": _softplus,
}

_LAYERS: dict[str, Callable[[Spec, Flow, nnx.Rngs], tuple[Layer, Flow]]] = {
    "Linear": _linear,
    **{f"Conv{n}d": _conv for n in (1, 2, 3)},
    **{f"ConvTranspose{n}d": _conv_transpose for n in (1, 2, 3)},
    **{f"BatchNorm{n}d": _batch_norm for n in (1, 2, 3)},
    "LayerNorm": _layer_norm,
    "GroupNorm": _group_norm,
    "Embedding": _embedding,
    **{f"Dropout{n}": _dropout for n in ("", "1d", "2d", "3d")},
    "Flatten": _flatten,
    **{f"{kind}Pool{n}d": _pool for n in (1, 2, 3) for kind in ("Max", "Avg")},
    **{f"Adaptive{kind}Pool{n}d": _global_pool for n in (1, 2, 3) for kind in ("Max", "Avg")},
    "Softmax": _softmax,
    "LogSoftmax": _softmax,
}
