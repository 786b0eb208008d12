"""`jaxgrad finetune`: freeze a model but for a part, and re-train that."""

import dataclasses
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import optax
import tyro

import jaxgrad as jg
from jaxgrad.cli import _classifier
from jaxgrad.cli.pretrain import Pretrain

_PRETRAINED = Path("runs/pretrained")


@dataclasses.dataclass(frozen=True)
class Finetune:
    """Freeze a pretrained model but for its head, and re-train that on other digits.

    What is trained is said by patterns over the paths of the parameters: --train "head/**" is
    the default, --train "head/**" "layers/2/**" trains the last hidden layer too, and
    --train "**/bias" all biases. `jaxgrad inspect MODEL` lists the paths. Everything else is
    frozen: no gradient, no optimizer state, and the same bits afterwards.
    """

    source: Annotated[Path | None, tyro.conf.arg(name="from", metavar="PATH")] = None
    """The pretrained model. Without it runs/pretrained, made by `jaxgrad pretrain` if missing."""
    out: Path = Path("runs/finetuned")
    """Directory to save the model in. An earlier model of that name is replaced."""
    train: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATTERN ...")] = ("head/**",)
    """Patterns of the parameters to train; "!pattern" excludes."""
    data: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """MNIST or Fashion-MNIST: a directory with the four IDX files, or an .npz file."""
    classes: Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT ...")] = (5, 6, 7, 8, 9)
    """Labels to re-train on."""
    epochs: int = 20
    """How often to go through the rows."""
    batch_size: int = 64
    """Rows a step."""
    learning_rate: float = 1e-2
    """Of SGD."""
    momentum: float = 0.9
    """Of SGD."""
    seed: int = 0
    """Of the shuffling."""

    def run(self) -> None:
        """Loads, re-trains, reports and saves."""
        from rich.console import Console

        if not self.train or self.epochs < 1:
            raise ValueError("fine-tuning takes a --train pattern and --epochs of 1 or more.")
        console = Console()
        source = self.source or _PRETRAINED
        if self.source is None and not source.exists():
            Pretrain(data=self.data, seed=self.seed).run()
        model = _classifier.Classifier.load(source)
        train, test = _classifier.splits(self.data, self.classes)
        model.trained_on(train)

        sgd = optax.sgd(self.learning_rate, momentum=self.momentum)
        tx = jg.param_groups([(list(self.train), sgd)])
        assignment = tx.assign(model.params)
        leaves = dict(zip(jg.paths(model.params), jax.tree.leaves(model.params), strict=True))
        is_frozen = assignment.frozen.__contains__
        console.print(_classifier.table(f"{source}", leaves, lambda path: not is_frozen(path)))

        before = model.accuracy(model.params, test)
        state = jg.fit(
            model.loss,
            model.params,
            train,
            tx,
            epochs=self.epochs,
            batch_size=self.batch_size,
            key=jax.random.key(self.seed),
        )
        after = model.accuracy(state.params, test)
        losses = [rows.mean() for rows in np.array_split(state.losses, self.epochs)]
        console.print(
            f"Trained on {len(train['label']):,} rows, labels {' '.join(map(str, self.classes))}: "
            f"mean loss {losses[0]:.3f} in the first epoch, {losses[-1]:.3f} in epoch {self.epochs}"
        )
        console.print(
            f"Accuracy on {len(test['label']):,} other rows: "
            f"[bold]{before:.1%}[/] before, [bold]{after:.1%}[/] after"
        )
        jg.save(
            self.out,
            state.params,
            wrt=assignment.wrt,
            config={**model.config, "accuracy": after, "trained_on": list(self.classes)},
            overwrite=True,
        )
        console.print(f"Saved in {self.out}")
