"""`jaxgrad inspect`: what is in a checkpoint."""

import dataclasses
from pathlib import Path

import tyro

import jaxgrad as jg
from jaxgrad.cli import _classifier


@dataclasses.dataclass(frozen=True)
class Inspect:
    """List the paths, shapes, dtypes and bytes of a checkpoint, and which parts were trained.

    The paths are what the patterns of `jaxgrad finetune --train` match. Any tree that Orbax
    saved can be looked at; its arrays are not read.
    """

    path: tyro.conf.Positional[Path]
    """The directory of the checkpoint."""

    def run(self) -> None:
        """Prints the table."""
        from rich.console import Console

        info = jg.inspect(self.path)
        console = Console()
        console.print(_classifier.table(str(self.path), info.leaves, info.trained.__contains__))
        for name, value in info.config.items():
            console.print(f"{name}: {value}")
