"""The training options that the commands share, and the training they configure."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import optax
import tyro
from rich.console import Console

import jaxgrad as jg
from jaxgrad import callbacks, data
from jaxgrad._checkpoint.params import refuse_taken
from jaxgrad._devices.processes import is_first
from jaxgrad._tree.flat import PyTree
from jaxgrad.cli._checks import check_apart, check_file, check_numbers, check_output, check_plot
from jaxgrad.cli._classifier import Classifier
from jaxgrad.cli._distributed import Distributed


@dataclasses.dataclass(frozen=True)
class Training(Distributed):
    """Options of a command that trains."""

    epochs: int = 20
    """Passes over the training set."""
    batch_size: int = 64
    """Examples per step."""
    learning_rate: float = 1e-2
    """The learning rate of SGD."""
    momentum: float = 0.9
    """The momentum of SGD."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Keep the learning rate, or warm up for a twentieth of the steps and decay along a cosine."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """The precision of the computation; trained parameters stay in float32."""
    seed: int = 0
    """The seed of the initial weights, if any, and of the shuffling."""
    checkpoint: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """Directory to save the run in after each epoch. Ctrl-C then saves too."""
    resume: bool = False
    """Resume the run in --checkpoint; the result is the same as without the interruption."""
    patience: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Tolerate this many epochs without a better accuracy; one more ends the run. The weights of
    the epoch with the best accuracy are saved, not the last."""
    log: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write the record of each epoch to this file, one line of JSON each."""
    tensorboard: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """Write the records to this directory for TensorBoard."""
    plot: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Plot loss and accuracy over the steps in this file (.png, .svg, .pdf)."""

    def fit(
        self, model: Classifier, train: data.Dataset, test: data.Dataset, wrt: jg.Wrt = "**"
    ) -> jg.TrainState:
        """Trains a model with these options; with --patience, the state has the best weights."""
        loss = model.loss if self.precision == "float32" else jg.mixed_precision(model.loss)
        return jg.fit(
            loss,
            model.params,
            train,
            jg.param_groups([(wrt, self._sgd(len(train["label"])))]),
            epochs=self.epochs,
            batch_size=self.batch_size,
            key=jax.random.key(self.seed),
            callbacks=self._callbacks(model, test),
            checkpoint=self.checkpoint and jg.Checkpoints(self.checkpoint, config=model.config),
            resume=self.resume,
            mesh=self.mesh(),
        )

    def check(self, out: Path, overwrite: bool) -> None:
        """Raises if an option can't be meant or an output can't be written, before any training."""
        check_numbers(self)
        if self.resume and self.checkpoint is None:
            raise ValueError("--resume needs the directory of the run: --checkpoint PATH.")
        check_apart(
            out,
            checkpoint=self.checkpoint,
            log=self.log,
            tensorboard=self.tensorboard,
            plot=self.plot,
        )
        refuse_taken(out, overwrite)
        for option, path in (
            ("--out", out),
            ("--checkpoint", self.checkpoint and self.checkpoint / "steps"),
            ("--tensorboard", self.tensorboard and self.tensorboard / "events"),
        ):
            check_output(option, path)
        check_file("--log", self.log)
        check_plot(self.plot)
        if self.tensorboard:
            import tensorboardX  # noqa: F401

    def draw(self, state: jg.TrainState) -> None:
        """Draws --plot: last, when the model is on the disk."""
        if self.plot and is_first():
            self.plot.parent.mkdir(parents=True, exist_ok=True)
            callbacks.plot_history(state.history, self.plot)

    def report_best(self, console: Console, state: jg.TrainState) -> None:
        """Prints which epoch's weights --patience kept."""
        if self.patience is not None:
            best = max(state.history, key=lambda record: record["test_accuracy"])
            last = state.history[-1]["epoch"] + 1
            console.print(f"Kept the weights of epoch {best['epoch'] + 1}, the best of {last}")

    def _sgd(self, rows: int) -> optax.GradientTransformation:
        rate: Any = self.learning_rate
        if self.schedule == "cosine":
            steps = self.epochs * -(-rows // self.batch_size)
            rate = optax.warmup_cosine_decay_schedule(0.0, rate, steps // 20, steps)
        return optax.sgd(rate, momentum=self.momentum)

    def _callbacks(self, model: Classifier, test: data.Dataset) -> list[Any]:
        chosen: list[Any] = []
        if self.patience is not None or self.log or self.tensorboard or self.plot:

            def metrics(params: PyTree, batch: data.Dataset) -> dict[str, jax.Array]:
                logits = model.logits(params, batch["image"])
                return {
                    "loss": model.loss(params, batch),
                    "accuracy": jnp.mean(logits.argmax(-1) == batch["label"]),
                }

            chosen.append(callbacks.evaluate(metrics, test))
        if self.log and is_first():
            chosen.append(callbacks.write_jsonl(self.log))
        if self.tensorboard and is_first():
            chosen.append(callbacks.write_tensorboard(self.tensorboard))
        if self.patience is not None:
            chosen.append(
                callbacks.early_stopping(
                    "test_accuracy", patience=self.patience, mode="max", restore_best=True
                )
            )
        return chosen
