"""`jaxgrad inspect`: lists the contents of a checkpoint or a PyTorch file."""

import dataclasses
from pathlib import Path

import tyro

import jaxgrad as jg
from jaxgrad.cli._table import table


@dataclasses.dataclass(frozen=True)
class Inspect:
    """List the paths, shapes, dtypes and bytes of a checkpoint, and which parts were trained.

    The paths are what the patterns of `jaxgrad finetune --train` match.

    $ jaxgrad inspect runs/finetuned
    $ jaxgrad inspect mnist_model.pt

    A directory is a checkpoint of jaxgrad, or any tree that Orbax saved. A file is PyTorch's, or
    safetensors, or the index of a sharded model (model.safetensors.index.json). Files are read
    without PyTorch and without running code in them. Arrays are not read.
    """

    path: tyro.conf.Positional[Path]
    """The directory or the file."""

    def run(self) -> None:
        """Prints the table."""
        from rich.console import Console

        console = Console(soft_wrap=True)
        if self.path.is_file():
            self._torch(console)
            return
        info = jg.inspect(self.path)
        console.print(table(str(self.path), info.leaves, info.trained))
        for name, value in info.config.items():
            if name != "module":  # a page of structure, not for people
                console.print(f"{name}: {value}")

    def _torch(self, console) -> None:
        file = jg.torch.read(self.path)
        console.print(table(f"{self.path} ({file.format})", file.tensors, None))
        for names in file.tied:
            console.print(f"tied: {' = '.join(names)}", markup=False)
        for name, value in file.values.items():
            console.print(f"{name}: {value!r}", markup=False)
        for name, cls in file.opaque.items():
            console.print(f"{name}: not read ({cls})", markup=False)
        for name, module in file.modules.items():
            console.print(f"{name + ': ' if name else ''}{module!r}", markup=False)
