"""The `jaxgrad` command: one file per subcommand, each a dataclass of its options and a `run`.

A user's mistake ends in one line on standard error and exit status 1 (2 for the command line
itself); a traceback means a bug in jaxgrad.
"""

import sys
from collections.abc import Sequence
from importlib import metadata

import jaxgrad as jg
from jaxgrad.cli._words import in_own_words

_DESCRIPTION = """\
Selective differentiation and fine-tuning for JAX.

Start with `jaxgrad finetune`: it trains an MLP on the handwritten digits 0 to 4, freezes all
but its head, and retrains the head on the digits 5 to 9. It downloads nothing and takes less than
a minute. `jaxgrad inspect runs/finetuned` then lists the trained and the frozen parameters, and
`jaxgrad predict picture.png` reads a digit with the result.

`jaxgrad COMMAND --help` explains a command. To complete options in the shell:

$ jaxgrad --tyro-write-completion bash ~/.local/share/bash-completion/completions/jaxgrad
$ jaxgrad --tyro-write-completion zsh ~/.zfunc/_jaxgrad
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status.

    Args:
        argv: the arguments; by default those of the process.

    Returns:
        0, or 1 after an error that the user can fix; a wrong command line exits with 2.

    Example:
        >>> from jaxgrad.cli import main
        >>> main(["inspect", "nowhere"])    # doctest: +SKIP
        1
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv == ["--version"]:
        print(f"jaxgrad {metadata.version('jaxgrad')}")
        return 0
    try:
        import tyro

        from jaxgrad.cli.audit import Audit
        from jaxgrad.cli.convert import Convert
        from jaxgrad.cli.finetune import Finetune
        from jaxgrad.cli.graph import Graph
        from jaxgrad.cli.inspect import Inspect
        from jaxgrad.cli.predict import Predict
        from jaxgrad.cli.pretrain import Pretrain
    except ModuleNotFoundError as e:
        return _fail(in_own_words(e))
    commands = {
        "finetune": Finetune,
        "pretrain": Pretrain,
        "predict": Predict,
        "inspect": Inspect,
        "convert": Convert,
        "audit": Audit,
        "graph": Graph,
    }
    command = tyro.extras.subcommand_cli_from_dict(
        commands, prog="jaxgrad", description=_DESCRIPTION, args=argv
    )
    try:
        command.run()
    except jg.Interrupted as e:
        return _fail(in_own_words(e), 128 + e.signal)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except (ValueError, OSError, ArithmeticError, ModuleNotFoundError) as e:
        # The library's errors for bad input say what to do; a traceback would add nothing.
        return _fail(in_own_words(e))
    return 0


def _fail(message: str, status: int = 1) -> int:
    print(f"jaxgrad: {message}", file=sys.stderr)
    return status
