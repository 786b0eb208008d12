"""`jaxgrad graph`: draws a model and what is trained."""

import dataclasses
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import tyro

import jaxgrad as jg
from jaxgrad.cli._checks import check_file, check_numbers
from jaxgrad.cli._classifier import Classifier
from jaxgrad.cli.finetune import last_layer


@dataclasses.dataclass(frozen=True)
class Graph:
    """Draw a model's loss: its parameters and operations, what is trained, and what is frozen.

    Marks the value that a staged fine-tune stores, at the end of the frozen part.

    $ jaxgrad graph --out mlp.svg
    $ jaxgrad graph --from runs/finetuned --train "layers/1/**" "head/**" --depth 1 --out mlp.png
    """

    source: Annotated[Path, tyro.conf.arg(name="from", metavar="PATH")] = Path("runs/pretrained")
    """The model, as for `jaxgrad finetune --from`."""
    out: Path = Path("graph.svg")
    """The file to write: .svg, .png, .dot (Graphviz) or .mmd (Mermaid)."""
    train: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATTERN ...")] = ()
    """Patterns of the parameters to train; "!pattern" excludes. By default the last layer."""
    forward: Annotated[tuple[str, ...], tyro.conf.arg(metavar="STEP ...")] = ()
    """How the layers of a PyTorch file run, if the file does not show it."""
    depth: int | None = None
    """Draw each module at this depth as a box; 0 draws operations. By default a readable depth."""
    batch_size: int = 64
    """The batch size to draw."""

    def run(self) -> None:
        """Traces, draws and writes."""
        from rich.console import Console

        check_numbers(self)
        check_file("--out", self.out)
        model = Classifier.load(self.source, self.forward)
        batch = {
            "image": jax.ShapeDtypeStruct((self.batch_size, *model.shape), np.float32),
            "label": jax.ShapeDtypeStruct((self.batch_size,), np.int32),
        }
        wrt = list(self.train or [last_layer(model)])
        picture = jg.graph(model.loss, model.params, batch, wrt=wrt, depth=self.depth)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        picture.save(self.out)
        Console(soft_wrap=True).print(
            f"Wrote {self.out}: {len(picture.diagram.nodes)} nodes, "
            f"{len(picture.diagram.edges)} edges",
            markup=False,
            highlight=False,
        )
