"""A function as a graph of equations, with their dependencies, source lines and costs.

`trace` inlines the nested calls of JAX's own trace and names the inputs as `wrt` names them. The
equations then answer questions about a parameter ("does it reach the loss at all, and through
what?") without a guess.
"""

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core as jex

from jaxgrad._jaxpr.dataflow import between, depending, reads, taken
from jaxgrad._jaxpr.flops import flops
from jaxgrad._jaxpr.inline import inline
from jaxgrad._jaxpr.source import whence
from jaxgrad._tree.flat import Flat, PyTree, flatten, is_array
from jaxgrad._tree.wrt import Wrt, match


@dataclasses.dataclass(frozen=True)
class Equation:
    """One primitive operation of a traced function.

    Attributes:
        index: its position in the order of execution.
        primitive: the name of the JAX primitive, such as `dot_general`.
        inputs: the values that it reads: paths of inputs, `%i` for the output of equation i (`%i.j`
            for output j of several), or literals.
        outputs: dtype and shape of each output.
        source: the file, line and function that it comes from.
        scope: the Flax module or `jax.named_scope` around it, or "".
        flops: floating point operations.
    """

    index: int
    primitive: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    source: str
    scope: str
    flops: int

    def __str__(self) -> str:
        where = f"{self.source}{f' in {self.scope}' if self.scope else ''}"
        outs = ", ".join(self.outputs)
        return f"%{self.index} = {self.primitive}({', '.join(self.inputs)}) -> {outs}  # {where}"


@dataclasses.dataclass(frozen=True, repr=False)
class Graph:
    """A traced function; made by `jaxgrad.trace`.

    Attributes:
        jaxpr: the program, with nested calls inlined.
        inputs: the path of each input array: the argument's name, `/`, and the path within it.
        equations: the equations in order.
    """

    jaxpr: jex.Jaxpr
    inputs: tuple[str, ...]
    equations: tuple[Equation, ...]

    def __repr__(self) -> str:
        return "\n".join([f"inputs: {', '.join(self.inputs)}", *map(str, self.equations)])

    @property
    def flops(self) -> int:
        """Floating point operations of the function."""
        return sum(e.flops for e in self.equations)

    def depends_on(self, output: int | None = None) -> list[str]:
        """Returns the paths of the inputs that the outputs depend on.

        Args:
            output: an index into `jax.tree.leaves` of the outputs; all of them if None.
        """
        outs = self.jaxpr.outvars if output is None else [self.jaxpr.outvars[output]]
        needed = taken(between(self.jaxpr, self.jaxpr.invars, outs))
        named = zip(self.jaxpr.invars, self.inputs, strict=True)
        return [path for var, path in named if var in needed]

    def influences(self, wrt: Wrt) -> list[Equation]:
        """Returns the equations that depend on the selected inputs.

        Args:
            wrt: globs over `inputs`, or a predicate `(path, spec) -> bool`.

        Raises:
            SelectionError: a glob matches no input.
        """
        specs = [v.aval for v in self.jaxpr.invars]
        chosen = match(Flat(specs, None, list(self.inputs)), wrt)
        inputs = (v for v, c in zip(self.jaxpr.invars, chosen, strict=True) if c)
        reached = depending(self.jaxpr.eqns, inputs)
        pairs = zip(self.jaxpr.eqns, self.equations, strict=True)
        return [equation for eqn, equation in pairs if reads(eqn, reached)]


def trace(fun: Callable[..., Any], *args: PyTree) -> Graph:
    """Returns the graph of a function: its equations, with source lines, scopes and costs.

    The graph looks through calls of `jit`, checkpoints and custom derivatives; a `scan`, `while` or
    `cond` is one equation.

    Args:
        fun: a function that JAX can trace.
        *args: its arguments: trees of arrays or of `jax.ShapeDtypeStruct`.

    Returns:
        The graph. Print it to list the equations.

    Example:
        >>> import jax.numpy as jnp, jaxgrad as jg
        >>> def loss(params, x):
        ...     return jnp.sum(jnp.tanh(x @ params["trunk"]) @ params["head"])
        >>> params = {"head": jnp.ones(4), "trunk": jnp.ones((3, 4)), "unused": jnp.ones(2)}
        >>> graph = jg.trace(loss, params, jnp.ones((5, 3)))
        >>> graph.inputs
        ('params/head', 'params/trunk', 'params/unused', 'x')
        >>> graph.depends_on()
        ['params/head', 'params/trunk', 'x']
        >>> [e.primitive for e in graph.influences("params/head")]
        ['dot_general', 'reduce_sum']

    Source: the graph that `torchviz.make_dot` draws from a PyTorch tensor's `grad_fn`.
    """
    flats = [flatten(arg) for arg in args]
    arrays = [[x for x in flat.leaves if is_array(x)] for flat in flats]

    def of_arrays(*arrays: list[jax.Array]) -> Any:
        return fun(*(_filled(f, values) for f, values in zip(flats, arrays, strict=True)))

    closed = jax.make_jaxpr(of_arrays)(*arrays)
    names = [
        "/".join(part for part in (name, path) if part)
        for name, flat in zip(_argument_names(fun, len(args)), flats, strict=True)
        for path, leaf in zip(flat.paths, flat.leaves, strict=True)
        if is_array(leaf)
    ]
    flat = inline(closed, [False] * len(closed.jaxpr.invars))
    closed_over = [f"closed over/{i}" for i in range(len(flat.consts))]
    inputs = (*closed_over, *names)
    return Graph(flat.jaxpr, inputs, _equations(flat.jaxpr, inputs))


def _equations(jaxpr: jex.Jaxpr, inputs: Sequence[str]) -> tuple[Equation, ...]:
    names = dict(zip(jaxpr.invars, inputs, strict=True))
    equations = []
    for i, eqn in enumerate(jaxpr.eqns):
        several = len(eqn.outvars) > 1
        equations.append(
            Equation(
                i,
                eqn.primitive.name,
                tuple(names[v] if isinstance(v, jex.Var) else str(v.val) for v in eqn.invars),
                tuple(v.aval.str_short(short_dtypes=False) for v in eqn.outvars),
                *whence(eqn),
                flops(eqn),
            )
        )
        names.update({v: f"%{i}.{j}" if several else f"%{i}" for j, v in enumerate(eqn.outvars)})
    return tuple(equations)


def _argument_names(fun: Callable[..., Any], count: int) -> list[str]:
    try:
        parameters = inspect.signature(fun).parameters.values()
    except (TypeError, ValueError):  # a builtin, or a wrapped C function
        parameters = ()
    positional = [
        p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    return [positional[i] if i < len(positional) else str(i) for i in range(count)]


def _filled(flat: Flat, arrays: Sequence[jax.Array]) -> PyTree:
    values = iter(arrays)
    return flat.treedef.unflatten([next(values) if is_array(x) else x for x in flat.leaves])
