"""`jaxgrad pretrain`: trains a model to fine-tune."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

import jaxgrad as jg
from jaxgrad import data
from jaxgrad.cli._checks import check_classes
from jaxgrad.cli._classifier import Classifier
from jaxgrad.cli._training import Training


@dataclasses.dataclass(frozen=True)
class Pretrain(Training):
    """Train an MLP on handwritten digits, by default 0 to 4, and save it.

    `jaxgrad finetune` starts from the saved model. All parameters are trained, by SGD with
    momentum. Without `--data`, the digits are the 1,797 that come with scikit-learn.

    $ jaxgrad pretrain --hidden 512 512 --epochs 40
    $ jaxgrad pretrain --data fashion-mnist/ --classes 0 1 2 3 4 --out runs/fashion
    """

    out: Path = Path("runs/pretrained")
    """Directory to save the model in."""
    data: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """MNIST or Fashion-MNIST: a directory with the four IDX files, or an .npz file."""
    classes: Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT ...")] = (0, 1, 2, 3, 4)
    """Labels to train on."""
    hidden: Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT ...")] = (512, 512, 256)
    """Widths of the hidden layers."""
    overwrite: bool = False
    """Replace the model in --out."""

    def run(self) -> None:
        """Trains, reports and saves."""
        self.check(self.out, self.overwrite)
        console = self.join()
        train, test = digits_or_files(self.data, self.classes)
        check_classes(self.classes, train)
        outputs = max(10, *(c + 1 for c in self.classes))
        pixels = train["image"][0].size
        model = Classifier.create(self.hidden, pixels, outputs, self.seed)
        console.print(
            f"Pretraining on {len(train['label']):,} rows, labels "
            f"{' '.join(map(str, self.classes))}, for {self.epochs} epochs."
        )
        state = self.fit(model, train, test)
        accuracy = model.accuracy(state.params, test)
        saved = model.keep(
            self.out,
            state.params,
            jg.paths(state.params),
            overwrite=self.overwrite,
            accuracy=accuracy,
            trained_on=list(self.classes),
        )
        console.print(f"Accuracy on {len(test['label']):,} other rows: [bold]{accuracy:.1%}[/]")
        self.report_best(console, state)
        console.print(f"Saved in {saved}")
        self.draw(state)


def digits_or_files(path: Path | None, classes: tuple[int, ...]) -> data.Splits:
    """The embedded digits, or the user's files."""
    return data.digits(classes) if path is None else data.mnist(path, classes)
