"""The flatten between convolutions and the first linear layer, which no file records.

PyTorch flattens features as (channels, height, width), Flax as (height, width, channels), unless
the Flax model moves its channels first. Neither choice shows in names or shapes, and the wrong
one gives a model that runs but is wrong. So this module finds the layers that may follow such a
flatten, and the user must declare them.

A layer is suspect if its inputs are a multiple of a convolution's channels and it comes right
after the convolution, in the order of the file or of the Flax model, or if no other layer outputs
that many features. An alphabetical order need not be the model's. Then counts decide: a layer is
suspect if more layers take that many features than output them.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Step(NamedTuple):
    """A layer as a step of the forward pass: its names, kind, and features in and out."""

    name: str
    path: str
    kind: str
    inputs: int
    outputs: int


def suspects(file: Sequence[Step], model: Sequence[Step]) -> dict[str, int]:
    """Names of the layers that may follow a flatten, with the number of channels before it.

    Args:
        file: the layers in the order of the file.
        model: the same layers in the order of the Flax model.
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
