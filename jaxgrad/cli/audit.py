"""`jaxgrad audit`: checks that frozen parameters are frozen."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import optax
import tyro

import jaxgrad as jg
from jaxgrad._text import count
from jaxgrad._tree.flat import flatten
from jaxgrad._tree.wrt import match
from jaxgrad.cli._checks import check_numbers
from jaxgrad.cli._classifier import Classifier
from jaxgrad.cli.finetune import last_layer
from jaxgrad.cli.pretrain import digits_or_files

Recipe = Literal["param-groups", "split", "partition", "masked", "freeze-before", "freeze-after"]


@dataclasses.dataclass(frozen=True)
class Audit:
    """Take a few steps of a fine-tune, and report what happens to each parameter.

    Is its gradient computed, what does the optimizer store for it, does it move, and why? Exits
    with status 1 if anything leaks.

    $ jaxgrad audit
    $ jaxgrad audit --recipe masked --optimizer adamw
    $ jaxgrad audit --from mnist_model.pt --train "fc3/**"

    `jaxgrad finetune` uses the recipe param-groups; the others are common in plain Optax:

    - split: differentiate the trained half, and initialize the optimizer on it.
    - partition: optax.partition, with optax.set_to_zero for the frozen parameters.
    - masked: optax.masked around the optimizer.
    - freeze-before, freeze-after: a masked optax.set_to_zero before the optimizer, or after it.
    """

    source: Annotated[Path, tyro.conf.arg(name="from", metavar="PATH")] = Path("runs/pretrained")
    """The model, as for `jaxgrad finetune --from`."""
    train: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATTERN ...")] = ()
    """Patterns of the parameters to train; "!pattern" excludes. By default the last layer."""
    forward: Annotated[tuple[str, ...], tyro.conf.arg(metavar="STEP ...")] = ()
    """How the layers of a PyTorch file run, if the file does not show it."""
    data: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """MNIST or Fashion-MNIST: a directory with the four IDX files, or an .npz file."""
    recipe: Recipe = "param-groups"
    """How the other parameters are frozen."""
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    """The optimizer; sgd has a momentum of 0.9."""
    learning_rate: float = 1e-2
    """The learning rate of the optimizer."""
    weight_decay: float = 1e-2
    """The weight decay of adamw."""
    clip: float | None = None
    """Clip gradients to this global norm first."""
    batch_size: int = 64
    """Examples per step."""
    steps: int = 4
    """The number of steps to take."""

    def run(self) -> None:
        """Audits and prints; raises if anything leaks."""
        from rich.console import Console

        check_numbers(self)
        model = Classifier.load(self.source, self.forward)
        rows, _ = digits_or_files(self.data, tuple(range(10)))
        model.check(rows)
        batch = {name: array[: self.batch_size] for name, array in rows.items()}
        wrt = list(self.train or [last_layer(model)])
        grad = jg.grad(model.loss, wrt) if self.recipe == "split" else None
        audit = jg.audit(
            model.loss, model.params, batch, self._tx(model, wrt), wrt, grad=grad, steps=self.steps
        )
        Console(soft_wrap=True).print(str(audit), markup=False, highlight=False)
        if audit.leaks:
            raise ValueError(f"{self.source} by {self.recipe}: {count(audit.leaks, 'leak')} found.")

    def _tx(self, model: Classifier, wrt: list[str]) -> Any:
        tx = {
            "sgd": lambda: optax.sgd(self.learning_rate, momentum=0.9),
            "adam": lambda: optax.adam(self.learning_rate),
            "adamw": lambda: optax.adamw(self.learning_rate, weight_decay=self.weight_decay),
        }[self.optimizer]()
        flat = flatten(model.params)
        chosen = match(flat, wrt)
        trained = flat.treedef.unflatten(chosen)
        hide = optax.masked(optax.set_to_zero(), flat.treedef.unflatten([not c for c in chosen]))
        labels = flat.treedef.unflatten(["trained" if c else "frozen" for c in chosen])
        made = {
            "param-groups": lambda: jg.param_groups([(wrt, tx)]),
            "split": lambda: tx,
            "partition": lambda: optax.partition(
                {"trained": tx, "frozen": optax.set_to_zero()}, labels
            ),
            "masked": lambda: optax.masked(tx, trained),
            "freeze-before": lambda: optax.chain(hide, tx),
            "freeze-after": lambda: optax.chain(tx, hide),
        }[self.recipe]()
        if self.clip is None:
            return made
        return optax.chain(optax.clip_by_global_norm(self.clip), made)
