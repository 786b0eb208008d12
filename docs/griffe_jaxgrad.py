"""Docstrings as the reference shows them: examples as code, commands as tables of options."""

import ast
import re

import griffe


class Docstrings(griffe.Extension):
    """Gives examples the name that griffe looks for, and shell commands a block of their own."""

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        if obj.docstring:
            text = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")
            obj.docstring.value = re.sub(r"(?:^\$ .+\n?)+", _shell, text, flags=re.MULTILINE)


class Commands(griffe.Extension):
    """Lists a command's options by the names that they have in the shell."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: object) -> None:
        for module in pkg["cli"].modules.values():
            for command in module.classes.values():
                if not command.name.startswith("_") and "run" in command.members:
                    _list_options(command)


def _shell(block: re.Match[str]) -> str:
    """Commands as a fenced block; as prose, the stars of a pattern would be taken for emphasis."""
    return f"```sh\n{block[0].replace('$ ', '').rstrip()}\n```\n"


def _list_options(command: griffe.Class) -> None:
    """Moves the fields of a command, inherited ones last, from its members to its docstring."""
    members = {**command.members, **command.inherited_members}
    fields = {name: member for name, member in members.items() if member.is_attribute}
    rows = [_row(name, field) for name, field in fields.items()]
    assert command.docstring, command.path
    table = "\n".join(["| option | by default | |", "| --- | --- | --- |", *rows])
    command.docstring.value += f"\n\n{table}\n"
    for name in [*command.members]:
        del command.members[name]


def _row(name: str, field: griffe.Object | griffe.Alias) -> str:
    annotation = str(field.annotation)
    renamed = re.search(r"""name=['"](.+?)['"]""", annotation)
    shown = (
        name.upper()
        if "Positional[" in annotation
        else "--" + (renamed[1] if renamed else name).replace("_", "-")
    )
    says = " ".join(field.docstring.value.split()) if field.docstring else ""
    return f"| `{shown}` | {_default(field)} | {says} |"


def _default(field: griffe.Object | griffe.Alias) -> str:
    """A default as one would type it."""
    value = "" if field.value is None else str(field.value)
    if value.startswith("Path("):
        value = value[len("Path(") : -1]
    try:
        literal = ast.literal_eval(value)
    except (SyntaxError, ValueError):
        return f"`{value}`" if value else ""
    if literal is None or literal is False or literal in ((), ""):
        return ""
    words = literal if isinstance(literal, tuple) else (literal,)
    return f"`{' '.join(map(str, words))}`"
