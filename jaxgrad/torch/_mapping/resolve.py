"""Decides what names and shapes leave open about a pair: layer type, settings, a flatten before it.

Filling a Flax tree and writing a PyTorch file both decide here, so they use the same evidence and
refuse the same cases.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jaxgrad.torch._mapping import conv_flatten, layouts
from jaxgrad.torch._mapping.conv_flatten import Step
from jaxgrad.torch._mapping.flax_layers import GATES, Layer, Tree, bare
from jaxgrad.torch._mapping.layouts import Shape
from jaxgrad.torch._mapping.pairing import Match
from jaxgrad.torch._mapping.report import Problem
from jaxgrad.torch._mapping.rules import Group


def typed(found: Match, told: str | None, shapes: Mapping[str, Shape]) -> Layer | Problem:
    """The layer with its type decided, or why it is ambiguous.

    Args:
        found: a layer and its module.
        told: the layer type that a whole-module file records.
        shapes: the shapes of the file's tensors, by name; empty if the file is yet to be written.
    """
    layer, group, _ = found
    if group.layer == "same" and layer.kind in ("linear", "conv", "conv_transpose"):
        return dataclasses.replace(layer, kind="same")
    if not layer.kind.endswith("?"):
        if told is None or _compatible(layer.kind, told):
            return layer
        return Problem(
            "layer type",
            f"{layer.path!r} is of type {layer.kind} in Flax and {told} in the file",
        )
    kind = group.layer or _open_kind(layer, group, told, shapes)
    if kind is not None:
        return dataclasses.replace(layer, kind=kind)
    name = group.tensors.get("weight") or next(iter(group.tensors.values()))
    leaf = layer.leaves.get("kernel") or next(iter(layer.leaves.values()))
    shape = f" {list(shapes[name])}" if name in shapes else ""
    choices = (
        '"same", "linear", "conv" or "embedding"'
        if layer.kind == "?"
        else '"conv" (also for a ConvTranspose with transpose_kernel=True) or "conv_transpose"'
    )
    return Problem(
        "layout",
        f"{leaf.path!r} {list(leaf.shape)} and {name!r}{shape}: the layer type is ambiguous; "
        f"declare it with Rule({module_of(name, group)!r}, layer=...): {choices}",
    )


def settings(layer: Layer, config: Mapping[str, Any]) -> Problem | None:
    """A setting that no tensor shows and that differs between the file and the Flax model."""
    ours: dict[str, Any] = {} if layer.epsilon is None else {"eps": layer.epsilon}
    if layer.kind == "attention":
        ours["num_heads"] = layer.leaves["query/kernel"].shape[1]
    for name, value in ours.items():
        if config.get(name, value) != value:
            return Problem(
                "setting",
                f"{layer.path!r} has {name} {value} in Flax and {config[name]} in the file",
            )
    return None


def channels(matches: Sequence[Match], tree: Tree) -> tuple[dict[str, int], dict[str, Problem]]:
    """By layer path: the channels before its flatten, or why the flatten must be declared."""
    if tree.flattens_channels_first:
        return {}, {}
    steps = {m.layer.path: _step(m) for m in matches if m.layer.kind not in ("same", "?")}
    place = {path: i for i, path in enumerate(map(bare, tree.order))}
    model = sorted(
        (m.layer for m in matches if m.layer.path in steps),
        key=lambda layer: min(place.get(bare(x.path), len(place)) for x in layer.leaves.values()),
    )
    suspects = conv_flatten.suspects(list(steps.values()), [steps[x.path] for x in model])
    found: dict[str, int] = {}
    problems: dict[str, Problem] = {}
    for layer, group, _ in matches:
        if layer.kind not in ("linear", "norm") or layer.path not in steps:
            continue
        step = steps[layer.path]
        if group.flatten is None and step.name in suspects:
            problems[layer.path] = Problem("flatten", _undeclared(step, suspects[step.name]))
        elif group.flatten and step.inputs % group.flatten:
            problems[layer.path] = Problem(
                "flatten",
                f"{step.name!r} takes {step.inputs} features, which is not a multiple of the "
                f"{group.flatten} channels that a rule declares",
            )
        else:
            found[layer.path] = group.flatten or 1
    return found, problems


def module_of(name: str, group: Group) -> str:
    """The name of the module that holds a tensor; a bare parameter has its own name."""
    return name if "" in group.tensors else name.rpartition(".")[0]


def _compatible(kind: str, told: str) -> bool:
    return kind == told or {kind, told} <= {"linear", "attention"}


def _open_kind(
    layer: Layer, group: Group, told: str | None, shapes: Mapping[str, Shape]
) -> str | None:
    """The layer type that Flax leaves open, from the file; None if that leaves it open too."""
    if layer.kind == "?":
        return "same" if len(layer.leaves[""].shape) <= 1 else None
    weight = shapes.get(group.tensors.get("weight", ""))
    kernel = layer.leaves["kernel"].shape
    if weight is None or len(weight) != len(kernel):
        return None
    if told == "conv" and layer.kind == "conv?":
        return "conv"
    if kernel[-1] == kernel[-2]:
        return None
    # The two types order the channels differently, so the shape rules one of them out.
    as_conv = weight[:2] == (kernel[-1], kernel[-2])
    return "conv" if as_conv else "conv_transpose"


def _step(found: Match) -> Step:
    layer, group, _ = found
    shapes = {name: leaf.shape for name, leaf in layer.leaves.items()}
    match layer.kind:
        case "linear" if "kernel" in shapes:
            outputs, inputs = layouts.Matrix(layer.in_axes).torch_shape(shapes["kernel"])
        case "conv" | "conv_transpose" if "kernel" in shapes:
            inputs, outputs = shapes["kernel"][-2:]
            if layer.kind == "conv_transpose" and not layer.flipped:
                inputs, outputs = outputs, inputs
        case "embedding":
            inputs, outputs = shapes["embedding"]
        case "attention":
            inputs, outputs = shapes["query/kernel"][0], shapes["out/kernel"][-1]
        case "lstm" | "gru" | "rnn":
            gates = max(len(GATES[layer.kind]), 1)
            part = next(part for part in layer.parts() if part.sources == ("weight_hh",))
            outputs = part.torch_shape(shapes[part.leaf])[0] // gates
            inputs = outputs
        case _:
            inputs = outputs = next(iter(shapes.values()))[-1] if any(shapes.values()) else 0
    name = next(iter(group.tensors.values()))
    return Step(module_of(name, group), layer.path, layer.kind, inputs, outputs)


def _undeclared(step: Step, channels: int) -> str:
    return (
        f"{step.name!r} takes {step.inputs} = {channels} x {step.inputs // channels} features and "
        f"may follow a flatten of {channels} channels; declare it with "
        f"Rule({step.name!r}, flatten={channels}) if the Flax model flattens channels last, or "
        f"Rule({step.name!r}, flatten=False) if it flattens channels first or not at all"
    )
