"""The source of a mapping: a path, a checkpoint, or any mapping from names to arrays."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike

from jaxgrad.torch._mapping.report import MappingError
from jaxgrad.torch._mapping.rules import Group
from jaxgrad.torch._reading.module import Module
from jaxgrad.torch._reading.read import Checkpoint, read

Source: TypeAlias = str | os.PathLike[str] | Checkpoint | Mapping[str, ArrayLike]
"""A PyTorch file's path, a `Checkpoint`, or a mapping from names to arrays."""

_TORCH_KINDS = {
    "Linear": "linear",
    "NonDynamicallyQuantizableLinear": "linear",
    "Embedding": "embedding",
    "MultiheadAttention": "attention",
    **{f"Conv{n}d": "conv" for n in (1, 2, 3)},
    **{f"ConvTranspose{n}d": "conv_transpose" for n in (1, 2, 3)},
    **{f"{name}{n}d": "norm" for n in (1, 2, 3) for name in ("BatchNorm", "InstanceNorm")},
    **dict.fromkeys(("LayerNorm", "GroupNorm", "SyncBatchNorm", "RMSNorm"), "norm"),
    **{f"{name}{cell}": name.lower() for name in ("LSTM", "GRU", "RNN") for cell in ("", "Cell")},
}


@dataclasses.dataclass(frozen=True)
class File:
    """What a mapping needs to know of its source."""

    name: str
    tensors: Mapping[str, np.ndarray]
    tied: Sequence[Sequence[str]] = ()
    module: Module | None = None

    @staticmethod
    def open(source: Source) -> "File":
        if isinstance(source, Mapping):
            return File("the mapping", {name: np.asarray(x) for name, x in source.items()})
        if isinstance(source, str | os.PathLike):
            source = read(source)
        if not isinstance(source, Checkpoint):
            raise MappingError(
                f"the source is a {type(source).__name__}; pass a path, a "
                "jaxgrad.torch.Checkpoint, or a mapping from PyTorch names to arrays"
            )
        return File(source.path.name, source.tensors, source.tied, source.module)

    def structure(self, group: Group) -> Module | None:
        """The `torch.nn` module that holds the tensors, if the file records it."""
        if self.module is None or "" in group.tensors:
            return None
        name = next(n for short, n in group.tensors.items() if not short.startswith("out_proj"))
        module: Module | None = self.module
        for part in name.split(".")[:-1]:
            module = module.children.get(part)
            if module is None:
                return None
        return module if module.cls.startswith("torch.nn.") else None

    def kind(self, group: Group) -> str | None:
        """The layer type of a module, if the file records it."""
        module = self.structure(group)
        return None if module is None else _TORCH_KINDS.get(module.cls.rpartition(".")[2])

    def config(self, group: Group) -> Mapping[str, Any]:
        """The configuration of a module, if the file records it."""
        module = self.structure(group)
        return {} if module is None else module.config
