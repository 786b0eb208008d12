"""Proves a mapping by comparing the model's outputs with recorded ones.

Shapes and names can agree while a gate, an axis or an epsilon is wrong. Only the outputs show it.
"""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
from flax import nnx

from jaxgrad._tree.flat import PyTree
from jaxgrad._tree.wrt import Wrt
from jaxgrad.torch._mapping.load_into import load_into
from jaxgrad.torch._mapping.report import MappingError
from jaxgrad.torch._mapping.rules import Rules
from jaxgrad.torch._mapping.source import Source


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How far outputs differ from the recorded ones.

    Attributes:
        max_error: the largest absolute difference.
        scale: the largest absolute value among the recorded outputs.
        at: the index of the largest difference, preceded by its path in a tree of outputs.

    Example:
        >>> import jaxgrad as jg
        >>> print(jg.torch.Comparison(max_error=2e-7, scale=3.1, at="[0, 4]"))
        max error 2e-07 at [0, 4], outputs up to 3.1
    """

    max_error: float
    scale: float
    at: str

    def __str__(self) -> str:
        return f"max error {self.max_error:.3g} at {self.at}, outputs up to {self.scale:.3g}"


def verify(
    model: PyTree,
    source: Source | None,
    inputs: PyTree,
    expected: PyTree,
    *,
    apply: Callable[..., PyTree] | None = None,
    rules: Rules = (),
    wrt: Wrt | None = None,
    atol: float = 1e-5,
    rtol: float = 1e-5,
) -> Comparison:
    """Compares a model's outputs with outputs recorded in PyTorch.

    Args:
        model: a callable NNX module, run in inference mode, or any parameter tree, run by `apply`.
        source: what to load into the model first, as in `load_into`; None if it is loaded already.
        inputs: the model's input, or a tuple of its arguments, in the Flax model's layout
            (images with channels last).
        expected: the recorded output, or a tree of outputs, in the Flax model's layout.
        apply: `(model, *inputs) -> output`, for a parameter tree.
        rules: as in `load_into`.
        wrt: as in `load_into`.
        atol: absolute tolerance, in units of the output.
        rtol: tolerance relative to each recorded value.

    Returns:
        The `Comparison`.

    Raises:
        MappingError: an output has another shape, is NaN and the recorded one is not, or differs
            by more than `atol + rtol * abs(expected)`.

    Example:
        >>> import numpy as np, jaxgrad as jg
        >>> params = {"fc": {"kernel": np.zeros((2, 1), np.float32)}}
        >>> tensors = {"fc.weight": np.array([[1, 2]], np.float32)}
        >>> x, y = np.ones((1, 2), np.float32), np.array([[3]], np.float32)
        >>> apply = lambda params, x: x @ params["fc"]["kernel"]
        >>> print(jg.torch.verify(params, tensors, x, y, apply=apply))
        max error 0 at [0, 0], outputs up to 3

    Source: `torch.testing.assert_close(model(inputs), expected)`.
    """
    if source is not None:
        model = load_into(model, source, rules=rules, wrt=wrt)
    arguments = inputs if isinstance(inputs, tuple) else (inputs,)
    if apply is not None:
        outputs = apply(model, *arguments)
    elif isinstance(model, nnx.Module) and callable(model):
        outputs = _inference(model)(*arguments)
    else:
        raise MappingError(
            f"a {type(model).__name__} can't be called: pass apply=lambda params, x: ..."
        )
    return _compare(outputs, expected, atol, rtol)


def _inference(model: nnx.Module) -> Callable[..., PyTree]:
    """A copy in inference mode: it uses running statistics, and drops and updates nothing."""
    model = nnx.clone(model)
    model.eval()
    return model  # pyright: ignore[reportReturnType]


def _compare(outputs: PyTree, expected: PyTree, atol: float, rtol: float) -> Comparison:
    ours, theirs = (jax.tree_util.tree_flatten_with_path(tree)[0] for tree in (outputs, expected))
    names = [[jax.tree_util.keystr(path) for path, _ in side] for side in (ours, theirs)]
    if names[0] != names[1]:
        raise MappingError(
            f"the outputs are {names[0] or 'none'} and the recorded ones {names[1] or 'none'}"
        )
    worst = Comparison(0.0, 0.0, "nowhere: the outputs are empty")
    over = 0
    total = 0
    for name, (_, a), (_, b) in zip(names[0], ours, theirs, strict=True):
        # In a wider type, so that the difference itself is not rounded.
        a, b = np.asarray(a), np.asarray(b)
        if a.shape != b.shape:
            raise MappingError(
                f"the output{name} has shape {a.shape} and the recorded one {b.shape}: PyTorch "
                "puts channels first, Flax last; transpose the recorded output to the model's order"
            )
        wide = np.complex128 if np.iscomplexobj(a) or np.iscomplexobj(b) else np.float64
        a, b = a.astype(wide), b.astype(wide)
        equal = (a == b) | (np.isnan(a) & np.isnan(b))
        with np.errstate(invalid="ignore"):  # inf - inf is NaN, which is not a small error
            error = np.where(equal, 0.0, np.abs(a - b))
            error = np.where(np.isnan(error), np.inf, error)
            over += int(np.sum(~(error <= atol + rtol * np.where(np.isfinite(b), np.abs(b), 0))))
        total += error.size
        if error.size and (worst.at.startswith("nowhere") or error.max() > worst.max_error):
            index = np.unravel_index(int(error.argmax()), error.shape)
            scale = float(np.max(np.abs(b), initial=0.0, where=np.isfinite(b)))
            worst = Comparison(float(error.max()), scale, f"{name}{[int(i) for i in index]}")
    if over:
        raise MappingError(
            f"{over} of {total} outputs differ by more than {atol:g} + {rtol:g} * abs(expected): "
            f"{worst}. Check the epsilons and momenta of norms, activations and paddings, the "
            "order of the inputs' axes, and `print(jaxgrad.torch.match(...))`"
        )
    return worst
