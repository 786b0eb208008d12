"""`jaxgrad convert`: between PyTorch files and Orbax checkpoints."""

import dataclasses
from pathlib import Path
from typing import Any

import tyro

import jaxgrad as jg
from jaxgrad.cli._checks import check_file, check_output
from jaxgrad.cli._classifier import Classifier

_TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")


@dataclasses.dataclass(frozen=True)
class Convert:
    """Convert a PyTorch file to an Orbax checkpoint, a safetensors file or a state dict, or back.

    The suffix of OUT decides the format: .safetensors, or .pt, .pth and .bin for a state dict. Any
    other OUT is the directory of an Orbax checkpoint. PyTorch is not needed, and code in a file is
    not run.

    $ jaxgrad convert mnist_model.pt runs/mnist
    $ jaxgrad convert runs/finetuned finetuned.safetensors
    $ jaxgrad convert training.ckpt weights.pt --part state_dict

    From PyTorch to Orbax, a whole module whose layers run in a known order becomes a Flax model
    with the module's names and Flax's layouts, which `jaxgrad finetune --from OUT` takes. A bare
    state dict has no layer types, so it keeps PyTorch's names and layouts; to load it into a Flax
    model use jaxgrad.torch.load_into. From Orbax to PyTorch, the names of Flax's leaves decide the
    layouts.
    """

    source: tyro.conf.Positional[Path]
    """A PyTorch file, or the directory of a checkpoint."""
    out: tyro.conf.Positional[Path]
    """The file or directory to write."""
    part: str = ""
    """The part of a training checkpoint to convert: "model", "state_dict.encoder"."""
    forward: tuple[str, ...] = ()
    """How the layers of a module run, if the file does not show it; see `finetune`."""
    overwrite: bool = False
    """Replace an existing OUT."""

    def run(self) -> None:
        """Reads the source, converts it and writes OUT."""
        from rich.console import Console

        if self.out.exists() and not self.overwrite:
            raise FileExistsError(f"'{self.out}' exists; pass --overwrite to replace it.")
        if not self.source.exists():
            raise FileNotFoundError(f"there is no file or checkpoint at '{self.source}'.")
        to_torch = self.out.suffix in _TORCH_SUFFIXES
        (check_file if to_torch else check_output)("OUT", self.out)
        if not self.source.is_file():
            if not to_torch:
                raise ValueError(
                    f"'{self.source}' is a checkpoint already: OUT must end in one of "
                    f"{', '.join(_TORCH_SUFFIXES)}."
                )
            tree = jg.load(self.source)
            self.out.parent.mkdir(parents=True, exist_ok=True)
            jg.torch.save_torch(tree, self.out)
            how = "layouts decided by the names of the leaves"
        else:
            file = jg.torch.read(self.source)
            try:
                file = file.sub(self.part) if self.part else file
            except KeyError as e:
                raise ValueError(e.args[0]) from e
            how = self._tensors(file) if to_torch or file.module is None else self._model(file)
        Console(soft_wrap=True).print(f"Wrote {self.out}: {how}", markup=False)

    def _tensors(self, file: "jg.torch.Checkpoint") -> str:
        if self.out.suffix in _TORCH_SUFFIXES:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            jg.torch.save_tensors(file.tensors, self.out)
        else:
            tree: dict[str, Any] = {n.replace(".", "/"): x for n, x in file.tensors.items()}
            config = {"layout": "torch"}
            jg.save(self.out, tree, config=config, overwrite=self.overwrite)
        return f"{len(file.tensors)} tensors, in PyTorch's names and layouts"

    def _model(self, file: "jg.torch.Checkpoint") -> str:
        model = Classifier.from_torch(file, self.forward)
        model.save(self.out, model.params, (), overwrite=self.overwrite)
        return f"a Flax model, {len(jg.paths(model.params))} parameters in Flax's layouts"
