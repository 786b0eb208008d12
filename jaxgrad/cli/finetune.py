"""`jaxgrad finetune`: freezes a model except for a part, and retrains that part."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro

import jaxgrad as jg
from jaxgrad import data
from jaxgrad.cli._checks import check_classes
from jaxgrad.cli._classifier import Classifier
from jaxgrad.cli._table import table
from jaxgrad.cli._training import Training
from jaxgrad.cli.pretrain import Pretrain, digits_or_files

_PRETRAINED = Path("runs/pretrained")


@dataclasses.dataclass(frozen=True)
class Finetune(Training):
    """Freeze a pretrained model except for its head, and retrain the head on other digits.

    Patterns over the paths of the parameters, which `jaxgrad inspect MODEL` lists, select what to
    train. Everything else is frozen: no gradient, no optimizer state, bit-identical afterwards.

    $ jaxgrad finetune
    $ jaxgrad finetune --train "head/**" "layers/1/**" --epochs 50 --schedule cosine
    $ jaxgrad finetune --train "**/bias" --checkpoint runs/biases --resume
    $ jaxgrad finetune --from mnist_model.pt --data mnist/

    A PyTorch file of a whole module is read without PyTorch and without running its code. If it
    does not show how its layers run, pass `--forward flatten fc1 relu fc2 relu fc3`: layers by
    name, and functions of jax.nn.
    """

    source: Annotated[Path | None, tyro.conf.arg(name="from", metavar="PATH")] = None
    """The pretrained model. By default runs/pretrained, made by `jaxgrad pretrain` if missing."""
    out: Path = Path("runs/finetuned")
    """Directory to save the model in. Replaces an earlier model there."""
    train: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PATTERN ...")] = ()
    """Patterns of the parameters to train; "!pattern" excludes. By default the last layer."""
    forward: Annotated[tuple[str, ...], tyro.conf.arg(metavar="STEP ...")] = ()
    """How the layers of a PyTorch file run, if the file does not show it."""
    data: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """MNIST or Fashion-MNIST: a directory with the four IDX files, or an .npz file."""
    classes: Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT ...")] = (5, 6, 7, 8, 9)
    """Labels to retrain on."""

    def run(self) -> None:
        """Loads, retrains, reports and saves."""
        self.check(self.out, overwrite=True)
        console = self.join()
        train, test = digits_or_files(self.data, self.classes)
        check_classes(self.classes, train)
        source = self.source or _PRETRAINED
        if self.source is None and not source.exists():
            Pretrain(data=self.data, seed=self.seed, distributed=self.distributed).run()
        model = Classifier.load(source, self.forward)
        model.check(train)
        if source.is_file():
            seen = model.predict(model.params, data.noise(12, seed=self.seed)["image"]).argmax(1)
            console.print(f"Predictions on noise: {' '.join(map(str, seen))}")

        wrt = list(self.train or [last_layer(model)])
        trained = jg.paths(jg.partition(model.params, wrt)[0])
        leaves = dict(zip(jg.paths(model.params), jax.tree.leaves(model.params), strict=True))
        console.print(table(str(source), leaves, trained))

        before = model.accuracy(model.params, test)
        state = self.fit(model, train, test, wrt)
        after = model.accuracy(state.params, test)
        # First of all: what prints or draws below may fail, and the training must not be lost.
        saved = model.keep(
            self.out,
            state.params,
            trained,
            overwrite=True,
            accuracy=after,
            trained_on=list(self.classes),
        )
        if state.resumed:
            console.print(state.resumed.capitalize(), markup=False)
        console.print(f"Staging: {state.staging}", markup=False)
        first, last = state.history[0], state.history[-1]
        console.print(
            f"Trained on {len(train['label']):,} rows, labels {' '.join(map(str, self.classes))}: "
            f"mean loss {first['loss']:.3f} in the first epoch, {last['loss']:.3f} in epoch "
            f"{last['epoch'] + 1}"
        )
        console.print(
            f"Accuracy on {len(test['label']):,} other rows: "
            f"[bold]{before:.1%}[/] before, [bold]{after:.1%}[/] after"
        )
        self.report_best(console, state)
        console.print(f"Saved in {saved}")
        self.draw(state)


def last_layer(model: Classifier) -> str:
    """The pattern of the head of our models, or of another model's last layer with parameters."""
    if model.config["model"] == "mlp":
        return "head/**"
    owners = {path.rpartition("/")[0] for path in jg.paths(model.params)}
    return [layer for layer in _layers(model.config["module"]) if layer in owners][-1] + "/**"


def _layers(module: Mapping[str, Any], path: str = "") -> Iterator[str]:
    for name, child in module["children"].items():
        yield f"{path}{name}"
        yield from _layers(child, f"{path}{name}/")
