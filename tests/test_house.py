"""The house: which rooms there are, which may import which, and that no file outgrows its room."""

import ast
from collections.abc import Iterator
from pathlib import Path

import jaxgrad

PACKAGE = Path(jaxgrad.__file__).parent

# From the ground up. A room imports from the floors below it, never from its own or from above.
FLOORS = [
    {"_disk", "_text"},
    {"_tree"},
    {"_devices", "_functional", "_jaxpr", "_optim", "torch"},
    {"_checkpoint", "_staging"},
    {"_autograd"},
    {"_audit", "_debug", "_drawing", "_training"},
    {"__init__", "callbacks", "data", "models"},
    {"cli"},
]
FLOOR = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}

# The face says what is public: it may be imported for its names by nobody but `cli`.
FACE = FLOORS[-2]


def modules() -> dict[str, Path]:
    """Each file by the name it is imported by."""
    files = PACKAGE.rglob("*.py")
    names = {".".join(f.relative_to(PACKAGE.parent).with_suffix("").parts): f for f in files}
    return {name.removesuffix(".__init__"): file for name, file in names.items()}


def imported(file: Path, known: dict[str, Path]) -> Iterator[str]:
    """The modules of the package that a file imports, at its top or within a function."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "jaxgrad":
            for name in node.names:
                inner = f"{node.module}.{name.name}"
                yield inner if inner in known else str(node.module)


def room(module: str) -> str:
    return [*module.split("."), "__init__"][1]


def test_every_file_is_in_a_room():
    assert {room(module) for module in modules()} == {*FLOOR}


def test_no_arrow_leads_up():
    known = modules()
    for module, file in known.items():
        for target in imported(file, known):
            here, there = room(module), room(target)
            if here != there and module != "jaxgrad":
                assert FLOOR[there] < FLOOR[here] or {here, there} <= FACE, (
                    f"{module} imports {target}: {here} is on floor {FLOOR[here]}, "
                    f"{there} on floor {FLOOR[there]}"
                )


def test_no_circle():
    known = modules()
    arrows = {m: {*imported(f, known)} - {m} for m, f in known.items() if m != "jaxgrad"}
    while ends := {m for m, targets in arrows.items() if not targets & arrows.keys()}:
        arrows = {m: targets for m, targets in arrows.items() if m not in ends}
    assert not arrows, f"among {sorted(arrows)} there is a circle"


def test_folders_say_what_they_own():
    for folder in PACKAGE.rglob("_*/"):
        if folder.name != "__pycache__":
            text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
            assert text and 3 <= len(text.splitlines()) <= 8, folder.name


def test_no_file_is_over_500_lines():
    lines = {file.name: len(file.read_text().splitlines()) for file in PACKAGE.rglob("*.py")}
    assert not {name: n for name, n in lines.items() if n > 500}


def functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef):
                yield f"{file.name}: {node.name}", node


def test_no_function_is_over_60_lines_without_its_docstring():
    lines = {}
    for name, node in functions():
        first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node
        lines[name] = (node.end_lineno or 0) - first.lineno + 1
    assert not {name: n for name, n in lines.items() if n > 60}


def test_no_function_takes_more_than_six_positional_arguments():
    taken = {
        name: sum(a.arg not in ("self", "cls") for a in node.args.posonlyargs + node.args.args)
        for name, node in functions()
    }
    assert not {name: n for name, n in taken.items() if n > 6}


def test_checkpoints_know_nothing_of_pytorch():
    known = modules()
    for module, file in known.items():
        if room(module) == "_checkpoint":
            assert not {target for target in imported(file, known) if room(target) == "torch"}
