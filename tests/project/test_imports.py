"""Which files of the package import which: in no circle, and not across the wings.

Imports are read from the source, so those inside functions and behind TYPE_CHECKING count as well.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import fused_resnet

PACKAGE = Path(fused_resnet.__file__).parent
ARCHITECTURE = Path(__file__).parents[2] / "docs" / "architecture.md"
Graph = dict[str, set[str]]

pytestmark = pytest.mark.quick


def imports(package: Path) -> Graph:
    """Each file's module, "ops.gradients" say, and the modules of the package that it imports."""
    files = {}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return {
        module: set(_imported(module, path, files)) - {module} for module, path in files.items()
    }


def _imported(module: str, path: Path, files: dict[str, Path]) -> Iterator[str]:
    """Of `from . import name`, the file of that name where there is one, else the package."""
    root = path.parents[module.count(".") + (path.name == "__init__.py" and module != "")].name
    here = module.split(".") if module else []
    if path.name != "__init__.py":
        here = here[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [root, *here][: len(here) + 2 - node.level] if node.level else []
            base += node.module.split(".") if node.module else []
            names = [".".join([*base, alias.name]) for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names = [_written_out(node.args[0], ".".join([root, *here]), module, root)]
        else:
            continue
        for name in names:
            if name.split(".")[0] != root:
                continue
            inner = name.split(".")[1:]
            while inner and ".".join(inner) not in files:
                inner.pop()
            yield ".".join(inner)


def _written_out(name: ast.expr, package: str, module: str, root: str) -> str:
    """A name that a call imports, as far as it can be read, of `__package__` and `__name__` too."""
    known = {"__package__": package, "__name__": f"{root}.{module}"}
    parts = name.values if isinstance(name, ast.JoinedStr) else [name]
    text = ""
    for part in parts:
        if isinstance(part, ast.Constant):
            text += str(part.value)
        elif isinstance(part, ast.FormattedValue) and ast.unparse(part.value) in known:
            text += known[ast.unparse(part.value)]
        else:
            break
    return text.rstrip(".")


def circle(graph: Graph) -> list[str] | None:
    """Modules that import each other in turn, the first one again at the end; None without any."""
    done: set[str] = set()

    def follow(module: str, path: list[str]) -> list[str] | None:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return None
        for other in sorted(graph[module]):
            if found := follow(other, [*path, module]):
                return found
        done.add(module)
        return None

    return next(filter(None, (follow(module, []) for module in sorted(graph))), None)


@pytest.fixture(scope="module")
def graph() -> Graph:
    return imports(PACKAGE)


def is_in(module: str, *folders: str) -> bool:
    return any(module == folder or module.startswith(f"{folder}.") for folder in folders)


def crossing(graph: Graph, here: tuple[str, ...], there: tuple[str, ...]) -> list[str]:
    """Imports from files in `here` of files in `there`."""
    return [
        f"{module} imports {other}"
        for module, others in sorted(graph.items())
        for other in sorted(others)
        if is_in(module, *here) and is_in(other, *there)
    ]


def test_no_circle(graph: Graph) -> None:
    assert circle(graph) is None


def floors() -> list[str]:
    """The files and folders of the package in the order of the drawing, the top first."""
    drawing = ARCHITECTURE.read_text().split("```")[1]
    names = re.findall(r"^\w+(?:/|\.py)|(?<=; )\w+\.py(?=:)", drawing, re.MULTILINE)
    return [name.removesuffix(".py").removesuffix("/") for name in names]


def test_each_floor_calls_those_below(graph: Graph) -> None:
    drawn = floors()
    assert set(drawn) == {module.split(".")[0] for module in graph if module}
    assert len(drawn) == len(set(drawn))
    upwards = [
        f"{module} imports {other}"
        for module, others in sorted(graph.items())
        for other in sorted(others - {""})
        if module and drawn.index(other.split(".")[0]) < drawn.index(module.split(".")[0])
    ]
    assert upwards == []


def test_operators_and_backends_meet_in_one_place(graph: Graph) -> None:
    """Operators ask `backends` for a backend, and know none; backends know no operator."""
    assert crossing(graph, ("backends",), ("ops", "modules", "functional", "blocks", "swap")) == []
    insides = tuple(m for m in graph if m.startswith("backends.") and m != "backends.backend")
    assert crossing(graph, ("ops", "functional", "modules", "blocks", "swap"), insides) == []


def test_what_measures_stands_above(graph: Graph) -> None:
    above = ("measure", "cli")
    below = tuple(module for module in graph if module and not is_in(module, *above))
    assert len(below) > 50
    assert crossing(graph, below, above) == []
    assert crossing(graph, ("measure",), ("cli",)) == []
    assert not any(is_in(module, *above) for module in graph[""])


def test_layers_are_the_ground(graph: Graph) -> None:
    rest = tuple(module for module in graph if module and not is_in(module, "layers"))
    assert crossing(graph, ("layers",), rest) == []


def test_tuning_only_chooses(graph: Graph) -> None:
    computing = ("ops", "backends", "modules", "functional", "blocks", "swap")
    assert crossing(graph, ("tuning",), computing) == []


def private_names(source: str) -> list[str]:
    """What begins with an underscore and is imported from another file, or looked up in it."""
    tree = ast.parse(source)
    imported = [
        alias
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level > 0
        for alias in node.names
    ]
    files = {alias.asname or alias.name for alias in imported}
    looked_up = [
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in files
    ]
    names = [alias.name for alias in imported] + looked_up
    known = ("_native", "__file__", "__name__")
    return [name for name in names if name.startswith("_") and name not in known]


def test_private_names_stay_in_their_files() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert private_names(path.read_text()) == [], path
    assert private_names("from . import a, _native\na._b, a.c") == ["_b"]
    assert private_names("from .a import _b\nfrom torch import _c") == ["_b"]


def test_what_the_walk_sees(tmp_path: Path) -> None:
    """Lazy and type-checking imports, relative and absolute, of files and of their names."""
    package = tmp_path / "house"
    (package / "wing").mkdir(parents=True)
    files = {
        "__init__.py": "from .roof import tile",
        "roof.py": "def f():\n    from .wing.door import handle",
        "wing/__init__.py": "from . import door",
        "wing/door.py": "import os\nif TYPE_CHECKING:\n    from ..cellar import light",
        "cellar.py": "import house.roof\nimportlib.import_module(f'{__package__}.wing.{name}')",
    }
    for name, text in files.items():
        (package / name).write_text(text)
    graph = imports(package)
    assert graph == {
        "": {"roof"},
        "roof": {"wing.door"},
        "wing": {"wing.door"},
        "wing.door": {"cellar"},
        "cellar": {"roof", "wing"},
    }
    assert circle(graph) == ["roof", "wing.door", "cellar", "roof"]
    assert circle(graph | {"cellar": {"wing"}}) == ["wing.door", "cellar", "wing", "wing.door"]
    assert circle(graph | {"cellar": set()}) is None
    assert crossing(graph, ("roof",), ("wing",)) == ["roof imports wing.door"]
