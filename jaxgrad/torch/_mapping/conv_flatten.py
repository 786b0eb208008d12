"""The flatten between convolutions and the first linear layer, which no file records.

PyTorch flattens features as (channels, height, width), Flax as (height, width, channels), unless
the Flax model moves its channels first before it flattens. Neither choice leaves a trace in
names or shapes, and the wrong one gives a model that runs and is wrong. So the layers that may
stand behind such a flatten are found here, and must be declared.

A layer may stand there if its inputs are a multiple of a convolution's channels and it comes
right behind the convolution, in the order of the file or of the Flax model, or if no other layer
puts out that many features. An order that is alphabetical may be nobody's: then the counts
decide, and a layer is suspect if more layers take that many features than put them out.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Step(NamedTuple):
    """A layer as a step of the forward pass: its kind, features in and out, and names."""

    name: str
    path: str
    kind: str
    inputs: int
    outputs: int


def suspects(file: Sequence[Step], model: Sequence[Step]) -> dict[str, int]:
    """Names of the layers that may stand behind a flatten, to the number of channels before it.

    Args:
        file: the layers in the order of the file.
        model: the same in the order of the Flax model.
    """
    orders = [
        steps
        for steps, names in ((file, [s.name for s in file]), (model, [s.path for s in model]))
        if names != sorted(names)
    ]
    in_doubt = not orders
    found: dict[str, int] = {}
    for steps in orders or (file, model):
        found |= dict(_behind_a_convolution(steps))
    return dict(_unaccounted(file, in_doubt)) | found


def _behind_a_convolution(steps: Iterable[Step]) -> Iterable[tuple[str, int]]:
    channels = None
    for step in steps:
        if step.kind.startswith("conv"):
            channels = step.outputs
        elif channels is None or (step.kind == "norm" and step.inputs == channels):
            continue
        elif step.kind in ("norm", "linear") and _is_flattened(step.inputs, channels):
            yield step.name, channels
            if step.kind == "linear":
                channels = None
        else:
            channels = None


def _unaccounted(steps: Sequence[Step], strict: bool) -> Iterable[tuple[str, int]]:
    convolutions = [step.outputs for step in steps if step.kind.startswith("conv")]
    for step in steps:
        if step.kind != "linear":
            continue
        channels = next((c for c in convolutions if _is_flattened(step.inputs, c)), None)
        if channels is None:
            continue
        makers = [s for s in steps if s.outputs == step.inputs and s.kind != "norm" and s != step]
        takers = [s for s in steps if s.inputs == step.inputs and s.kind == "linear"]
        if not makers or (strict and len(takers) > len(makers)):
            yield step.name, channels


def _is_flattened(inputs: int, channels: int) -> bool:
    return inputs > channels > 1 and inputs % channels == 0
