"""The library's messages in the words of the command line: `--batch-size 0`, not `batch_size=0`."""

import re

_WORDS = (
    (r"resume=True", "--resume"),
    (r"overwrite=True", "--overwrite"),
    (r"early_stopping\(restore_best=True\)", "--patience"),
    (r"\brestore_best\b", "--patience"),
    (r"\bwrt pattern\b", "--train pattern"),
    (r"\bwrt selects\b", "--train selects"),
    (r"\bclasses=\[([-\d, ]*)\]", r"--classes \1"),
    (r"\bbatch_size=(?=-?\d)", "--batch-size "),
    (r'\bforward=\("fc1", jax\.nn\.relu, "fc2", \.\.\.\)', "--forward fc1 relu fc2 ..."),
)


# The extra that brings a package, if it is not `cli`.
_EXTRAS = {"tensorboardX": "tensorboard"}


def in_own_words(error: BaseException) -> str:
    """The message of an error, as one line for someone who typed a command."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror and error.filename:
        text = f"'{error.filename}': {error.strerror}."
    if isinstance(error, ModuleNotFoundError) and "pip install" not in text:
        text = f"the command needs '{error.name}': pip install 'jaxgrad[{_extra(error.name)}]'"
    for pattern, words in _WORDS:
        text = re.sub(pattern, words, text)
    return " ".join(text.split())


def _extra(module: str | None) -> str:
    return _EXTRAS.get((module or "").partition(".")[0], "cli")
