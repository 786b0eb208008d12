"""Which axis of an equation's output counts the examples, given which axis of its inputs does.

A value is kept once per example only if its row i is computed from row i of the batch alone.
A batch size in its shape proves nothing: `x - x.mean(0)`, `cumsum` along the batch and
`x @ x.T @ x` keep the shape and mix the examples. So the axis is *followed*: the rule of each
primitive returns where the axis goes, or raises `Mixes`. A primitive without a rule is not staged,
so an unknown one is safe. `LEFT_OUT` lists JAX's primitives that have no rule on purpose.

Sizes are concrete or, if they scale with the batch, `Dim(k)`: k entries per example, those of one
example next to each other (`[b, t, d]` reshaped to `[b * t, d]` has `Dim(t)` in front).
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any


class Mixes(Exception):  # noqa: N818
    """An output row may depend on other rows of the batch."""


@dataclasses.dataclass(frozen=True)
class Dim:
    """A size that is `inner` times the batch size."""

    inner: int = 1


Shape = tuple[int | Dim, ...]


@dataclasses.dataclass(frozen=True)
class Step:
    """One equation as the rules see it.

    Attributes:
        params: the primitive's parameters.
        axes: the axis of each input that counts the examples; None for a constant.
        ins: the shapes of the inputs.
        outs: the shapes of the outputs.
    """

    params: Mapping[str, Any]
    axes: Sequence[int | None]
    ins: Sequence[Shape]
    outs: Sequence[Shape]

    @property
    def axis(self) -> int:
        """The axis that all per-example inputs agree on."""
        found = {a for a in self.axes if a is not None}
        if len(found) != 1:
            raise Mixes("combines inputs whose examples lie along different axes")
        return found.pop()


def follow(name: str, step: Step) -> list[int | None]:
    """The axis of each output of a primitive that has at least one per-example input.

    Raises:
        Mixes: the primitive combines examples.
    """
    axis = RULES[name](step)
    return list(axis) if isinstance(axis, Sequence) else [axis] * len(step.outs)


def _elementwise(step: Step) -> int:
    axis = step.axis
    ranks = {len(s) for s, a in zip(step.ins, step.axes, strict=True) if a is not None}
    if ranks != {len(step.outs[0])}:
        raise Mixes("combines inputs of different ranks")
    return axis


def _broadcast(step: Step) -> int:
    if step.axes[0] is None:
        raise Mixes("takes its shape from the examples")
    return step.params["broadcast_dimensions"][step.axis]


def _reshape(step: Step) -> int:
    if step.params["dimensions"] is not None:
        raise Mixes("reorders elements while it reshapes")
    before = math.prod(_static(step.ins[0][: step.axis]))
    for axis, size in enumerate(step.outs[0]):
        if isinstance(size, Dim) and math.prod(_static(step.outs[0][:axis])) == before:
            return axis
    raise Mixes("reshapes so that an example is no longer one contiguous row")


def _static(sizes: Sequence[int | Dim]) -> list[int]:
    if any(isinstance(s, Dim) for s in sizes):
        raise Mixes("has the batch size in more than one axis")
    return [s for s in sizes if isinstance(s, int)]


def _transpose(step: Step) -> int:
    return list(step.params["permutation"]).index(step.axis)


def _dropping(name: str, what: str) -> Callable[[Step], int]:
    """A rule for a primitive that drops axes: the batch axis must stay."""

    def rule(step: Step) -> int:
        axis, dropped = step.axis, _named(step, name)
        if axis in dropped:
            raise Mixes(what)
        return axis - sum(d < axis for d in dropped)

    return rule


def _along(name: str, what: str) -> Callable[[Step], int]:
    """A rule for a primitive that works along some axes: the batch axis must not be among them."""

    def rule(step: Step) -> int:
        if step.axis in _named(step, name):
            raise Mixes(what)
        return step.axis

    return rule


def _named(step: Step, name: str) -> list[int]:
    """The axes of the first input that a parameter names."""
    axes = step.params[name]
    axes = axes if isinstance(axes, tuple | list) else (axes,)
    return [d % len(step.ins[0]) for d in axes]


def _stack(step: Step) -> int:
    """All inputs have the same shape, so each has the examples, along the same axis."""
    return step.axis + (step.params["axis"] <= step.axis)


def _tile(step: Step) -> int:
    if step.params["reps"][step.axis] != 1:
        raise Mixes("repeats the batch")
    return step.axis


def _trailing(count: int | str) -> Callable[[Step], int]:
    """A rule for a primitive that works on the last axes; those before them are a batch."""

    def rule(step: Step) -> int:
        last = count if isinstance(count, int) else len(step.params[count])
        if step.axis >= len(step.ins[0]) - last:
            raise Mixes("works across the examples")
        return step.axis

    return rule


def _dot_general(step: Step) -> int:
    (contract, batch) = step.params["dimension_numbers"]
    positions = set()
    for side in (0, 1):
        axis = step.axes[side]
        if axis is None:
            continue
        if axis in contract[side]:
            raise Mixes("multiplies and sums over the examples")
        if axis in batch[side]:
            positions.add(batch[side].index(axis))
        elif step.axes[1 - side] is not None:
            raise Mixes("multiplies each example with the others")
        else:
            left, right = (
                [d for d in range(len(step.ins[s])) if d not in (*contract[s], *batch[s])]
                for s in (0, 1)
            )
            free = left.index(axis) if side == 0 else len(left) + right.index(axis)
            positions.add(len(batch[0]) + free)
    if len(positions) != 1:
        raise Mixes("multiplies each example with the others")
    return positions.pop()


def _conv(step: Step) -> int:
    numbers = step.params["dimension_numbers"]
    if step.axes[1] is not None:
        raise Mixes("convolves with a kernel that depends on the examples")
    if step.axes[0] != numbers.lhs_spec[0] or step.params["batch_group_count"] != 1:
        raise Mixes("convolves across the examples")
    return numbers.out_spec[0]


def _reduce_window(step: Step) -> int:
    axis, params = step.axis, step.params
    names = ("window_dimensions", "window_strides", "base_dilation", "window_dilation")
    if any(params[n][axis] != 1 for n in names) or tuple(params["padding"][axis]) != (0, 0):
        raise Mixes("slides a window along the examples")
    return axis


def _whole(step: Step) -> int:
    """Takes a part of an array that must keep the complete batch axis, in order."""
    axis = step.axis
    starts, strides = step.params.get("start_indices"), step.params.get("strides")
    if (
        step.outs[0][axis] != step.ins[0][axis]
        or (starts is not None and starts[axis] != 0)
        or (strides is not None and strides[axis] != 1)
    ):
        raise Mixes("picks some examples of the batch")
    return axis


def _dynamic_slice(step: Step) -> int:
    if any(a is not None for a in step.axes[1:]):
        raise Mixes("slices at a place that depends on the examples")
    return _whole(step)


def _dynamic_update_slice(step: Step) -> int:
    operand, update = step.ins[:2]
    if step.axes[0] is None or any(a is not None for a in step.axes[2:]):
        raise Mixes("writes to a place that depends on the examples")
    if operand[step.axis] != update[step.axis]:
        raise Mixes("writes to some examples of the batch")
    return step.axis


def _pad(step: Step) -> int:
    if tuple(map(int, step.params["padding_config"][step.axis])) != (0, 0, 0):
        raise Mixes("pads the batch")
    return step.axis


def _gather(step: Step) -> int:
    numbers, (operand, indices) = step.params["dimension_numbers"], step.ins
    of_operand, of_indices = step.axes
    out = range(len(step.outs[0]))
    batch_out = [d for d in out if d not in numbers.offset_dims]
    if of_indices is not None:
        if of_indices == len(indices) - 1:
            raise Mixes("indexes with the examples as coordinates")
        if of_operand is not None:
            paired = dict(
                zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True)
            )
            if paired.get(of_operand) != of_indices:
                raise Mixes("indexes into other examples")
        return batch_out[of_indices]
    assert of_operand is not None
    dropped = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    whole = step.params["slice_sizes"][of_operand] == operand[of_operand]
    if of_operand in dropped or of_operand in numbers.start_index_map or not whole:
        raise Mixes("picks some examples of the batch")
    window = [d for d in range(len(operand)) if d not in dropped]
    return numbers.offset_dims[window.index(of_operand)]


def _scatter(step: Step) -> int:
    """Writes into each example at places that all share, or that belong to the example itself."""
    numbers, (operand, indices, updates) = step.params["dimension_numbers"], step.ins
    of_operand, of_indices, of_updates = step.axes
    if of_operand is None:
        raise Mixes("writes examples into an array that has none of them")
    batch = [d for d in range(len(updates)) if d not in numbers.update_window_dims]
    if of_indices is not None:
        paired = dict(
            zip(numbers.operand_batching_dims, numbers.scatter_indices_batching_dims, strict=True)
        )
        if of_indices == len(indices) - 1 or paired.get(of_operand) != of_indices:
            raise Mixes("writes at indices, which may belong to other examples")
        written = batch[of_indices]
    else:
        dropped = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
        if of_operand in dropped or of_operand in numbers.scatter_dims_to_operand_dims:
            raise Mixes("writes to some examples of the batch")
        window = [d for d in range(len(operand)) if d not in dropped]
        written = numbers.update_window_dims[window.index(of_operand)]
    if of_updates not in (None, written) or updates[written] != operand[of_operand]:
        raise Mixes("writes to other examples")
    return of_operand


_ELEMENTWISE = """
abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e
bitcast_convert_type cbrt ceil clamp clz complex conj convert_element_type copy cos cosh
digamma div eq eq_to erf erf_inv erfc exp exp2 expm1 floor ge gt igamma igamma_grad_a igammac imag
integer_pow is_finite le le_to lgamma log log1p log2 logistic lt lt_to max min mul mulhi
name ne neg nextafter not one_minus_square or polygamma polynomial population_count pow real
reduce_precision regularized_incomplete_beta rem round rsqrt select_n sharding_constraint
shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square stop_gradient sub
tan tanh xor zeta
"""

_REDUCES = (
    "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor argmax argmin"
)
_WINDOWS = "reduce_window_sum reduce_window_max reduce_window_min"
_SCATTERS = "scatter scatter-add scatter-max scatter-min scatter-mul scatter-sub"
_MATRICES = "cholesky eig eigh hessenberg lu qr schur svd triangular_solve tridiagonal"

RULES: dict[str, Callable[[Step], int | Sequence[int | None]]] = {
    **dict.fromkeys(_ELEMENTWISE.split(), _elementwise),
    **dict.fromkeys(_REDUCES.split(), _dropping("axes", "reduces over the examples")),
    **dict.fromkeys(_WINDOWS.split(), _reduce_window),
    **dict.fromkeys(
        ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"),
        _along("axis", "accumulates along the examples"),
    ),
    **dict.fromkeys(_MATRICES.split(), _trailing(2)),
    "broadcast_in_dim": _broadcast,
    "concatenate": _along("dimension", "joins batches"),
    "conv_general_dilated": _conv,
    "dot_general": _dot_general,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "fft": _trailing("fft_lengths"),
    "gather": _gather,
    "jaxgrad_tap": lambda step: step.axes,
    "device_put": lambda step: step.axes,
    "lu_pivots_to_permutation": _trailing(1),
    "optimization_barrier": lambda step: step.axes,
    "pad": _pad,
    "reshape": _reshape,
    "rev": _along("dimensions", "reverses the order of the examples"),
    **dict.fromkeys(_SCATTERS.split(), _scatter),
    "slice": _whole,
    "sort": _along("dimension", "sorts the examples"),
    "split": _along("axis", "splits the batch"),
    "squeeze": _dropping("dimensions", "squeezes the batch"),
    "stack": _stack,
    "tile": _tile,
    "top_k": _along("axis", "picks some examples of the batch"),
    "transpose": _transpose,
    "unstack": _dropping("axis", "splits the batch"),
}

_COLLECTIVES = """
all_gather all_gather_done all_gather_invariant all_gather_reduced all_gather_reduced_start
all_gather_start all_to_all all_to_all_done all_to_all_start axis_index pbroadcast pbroadcast_done
pbroadcast_dynamic pbroadcast_start pmax pmin ppermute ppermute_done ppermute_start precv psend psum
psum_done psum_invariant psum_invariant_start psum_start ragged_all_to_all reduce_scatter
reduce_scatter_done reduce_scatter_start unreduced_pmax unreduced_pmin unreduced_psum
unreduced_psum_start unreduced_reduce_scatter unreduced_reduce_scatter_start
"""

# Refused for constants too: their result depends on the devices, or differs from run to run without
# an effect that shows it.
NEVER_CONSTANT = frozenset([*_COLLECTIVES.split(), "rng_uniform"])

_REASONS = {
    # A rule could follow these, but none does yet.
    "reduces with a function of its own, which is not followed": "reduce reduce_window",
    "moves values between windows, which are not followed": """
        select_and_gather_add select_and_scatter select_and_scatter_add
    """,
    "finds the largest values approximately, by a search that is not followed": "approx_top_k",
    "multiplies groups of rows whose sizes are data": "ragged_dot_general",
    "multiplies in blocks, which are not followed": "scaled_dot",
    "works on several arrays of matrices, whose axes are not followed": """
        cholesky_update geqp3 geqrf householder_product ormqr symmetric_product tridiagonal_solve
    """,
    "converts an extended dtype, whose hidden axes are not followed": "from_edtype to_edtype",
    "marks a value for the compiler, which is not followed": """
        dce_sink program_order tie xla_metadata_value
    """,
    "places a value on the devices, which is not followed": """
        layout_constraint preduced pvary reduced_vary_cast reduced_vary_cast_p relayout reshard
        shard_alike vary_unreduced_cast vary_unreduced_cast_p with_memory_space_constraint
    """,
    # Programs inside that have no view (`_jaxpr/views.py`).
    "has a program inside that is not followed": """
        composite compute_on custom_linear_solve custom_vmap_call linear_call remat_opt run_state
        xla_metadata_call
    """,
    "stands for an operation that JAX spells out only when it compiles it": """
        call_hi_primitive call_hi_primitive_linearized
    """,
    # Opaque: their code can't be read.
    "calls a Python function, which may do anything with the batch": """
        buffer_callback debug_callback debug_print inspect_sharding io_callback pure_callback
    """,
    "runs code from outside JAX, which may do anything with the batch": """
        call_exported custom_partitioning ffi_call
    """,
    "runs a kernel, which may do anything with the batch": """
        cudnn_fusion dot_product_attention_bwd dot_product_attention_bwd_wrapper
        dot_product_attention_fp8_bwd dot_product_attention_fp8_bwd_wrapper
        dot_product_attention_fp8_fwd dot_product_attention_fp8_fwd_wrapper
        dot_product_attention_fwd dot_product_attention_fwd_wrapper pallas_call scaled_matmul
        scaled_matmul_wrapper
    """,
    # Randomness: what an example draws depends on its position in the batch.
    "draws random values for the complete batch at once": """
        philox2x32 philox4x32 random_bits random_gamma rng_bit_generator rng_uniform threefry2x32
        threefry4x32
    """,
    "makes random keys, whose axes are not followed": """
        random_clone random_fold_in random_seed random_split random_unwrap random_wrap
    """,
    # State.
    "reads or writes memory that changes": """
        accum_grad_in_ref addupdate box_get box_set broadcast_to create_linear empty_ref free_ref
        freeze get log_extend log_read new_box new_log new_ref pin swap unpin
    """,
    "checks the complete batch at once": "check",
    # Devices.
    "depends on the devices that the examples are on": _COLLECTIVES,
    # No example reaches these: they have no inputs, or never occur in a finished program.
    "makes a value from no inputs": """
        after_all create_token dim_as_value empty empty2 iota iota_2x32_shape platform_index
    """,
    "asks for a size that is not known yet": "dimension_size shape_assertion",
    "is a step of JAX's own towards another program": """
        custom_jvp_call_jaxpr custom_lin stage unreachable zeros_like
    """,
}

# Primitives without a rule, and the reason; a refusal prints it after the primitive and its source
# line. The names cover all JAX versions that jaxgrad supports; `test_primitives.py` compares them
# with those of the installed JAX.
LEFT_OUT: dict[str, str] = {
    name: reason for reason, names in _REASONS.items() for name in names.split()
}
