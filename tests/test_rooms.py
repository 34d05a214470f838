"""The house: no room imports from one above it, and no modules import each other in a circle.

Read from the source, so that imports inside functions and under TYPE_CHECKING count too.
"""

import ast
from pathlib import Path

import fedl2p

PACKAGE = Path(fedl2p.__file__).parent
ROOMS: dict[str, int] = {
    "errors": 0,
    "io": 0,
    "pools": 0,
    "progress": 0,
    "seeding": 0,
    "signals": 0,
    "_aliases": 0,
    "datamodules": 1,
    "core": 1,
    "trainer_data": 2,
    "meta_iterations": 2,
    "client": 2,
    "policy": 2,
    "models": 3,
    "pretraining": 4,
    "federation": 5,
    "report": 6,
    "callbacks": 7,
    "experiment": 8,
    "cli": 9,
}
"""How high each room lies; a room imports from its own and from lower ones."""
FROM_DATAMODULES = {"errors", "io", "pools", "progress", "seeding", "_aliases", "datamodules"}
"""What data modules import: they know nothing of the method."""


def module_name(path: Path) -> str:
    """The dotted name of a file of the package, below `fedl2p`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem != "__init__"}
FILES |= {
    module_name(path): path
    for room in ("datamodules", "callbacks")  # links, which rglob may not follow
    for path in (PACKAGE / room).rglob("*.py")
}


def imports(path: Path, *, all_of_them: bool) -> set[str]:
    """The modules of the package that a file imports, or those alone that it imports while it is loaded."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: set[str] = set()
    nodes = list(ast.walk(tree)) if all_of_them else _while_loading(tree.body)
    for node in nodes:
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if not name.startswith("fedl2p."):
                continue
            below = name.removeprefix("fedl2p.")
            if below not in FILES:  # a class or function in a module
                below = below.rpartition(".")[0]
            if below in FILES:  # else a name of fedl2p itself, as __version__
                found.add(below)
    return found


def _while_loading(body: list[ast.stmt]) -> list[ast.AST]:
    """The statements that run when a module is imported: not those in functions or under TYPE_CHECKING."""
    found: list[ast.AST] = []
    for statement in body:
        found.append(statement)
        if isinstance(statement, ast.If):
            typing_only = "TYPE_CHECKING" in ast.unparse(statement.test)
            main_only = "__name__" in ast.unparse(statement.test)
            found += [] if typing_only or main_only else _while_loading(statement.body)
            found += _while_loading(statement.orelse)
        elif isinstance(statement, ast.Try):
            found += _while_loading(statement.body)
    return found


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """The sets of modules that reach each other, each sorted (Tarjan's strongly connected components)."""
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        number[module] = lowest[module] = len(number)
        stack.append(module)
        for other in edges[module]:
            if other not in number:
                visit(other)
                lowest[module] = min(lowest[module], lowest[other])
            elif other in stack:
                lowest[module] = min(lowest[module], number[other])
        if lowest[module] == number[module]:
            component = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(component) > 1:
                found.append(sorted(component))

    for module in edges:
        if module not in number:
            visit(module)
    return found


def room(module: str) -> str:
    return module.partition(".")[0]


def test_every_file_lies_in_a_known_room() -> None:
    assert {room(module) for module in FILES} == set(ROOMS)


def test_no_room_imports_upward() -> None:
    upward = [
        f"{module} imports {other}"
        for module, path in sorted(FILES.items())
        for other in sorted(imports(path, all_of_them=True))
        if ROOMS[room(other)] > ROOMS[room(module)]
    ]
    assert upward == []


def test_data_modules_know_nothing_of_the_method() -> None:
    strangers = [
        f"{module} imports {other}"
        for module, path in sorted(FILES.items())
        if room(module) == "datamodules"
        for other in sorted(imports(path, all_of_them=True))
        if room(other) not in FROM_DATAMODULES
    ]
    assert strangers == []


def test_no_modules_import_each_other_in_a_circle_while_they_are_loaded() -> None:
    # A package's own file imports its modules, which do not count as importing the package.
    assert circles({module: imports(path, all_of_them=False) for module, path in FILES.items()}) == []


def test_no_modules_import_each_other_in_a_circle_at_all() -> None:
    assert circles({module: imports(path, all_of_them=True) for module, path in FILES.items()}) == []


def test_circles_are_found() -> None:
    edges = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set()}
    assert circles(edges) == [["a", "b", "c"]]
