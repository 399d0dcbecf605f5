"""Checks what no linter does: import circles, homonyms, files that the docs name and nobody has, undocumented names.

python tests/structure.py    prints one line per offence and exits with 1 if there is any
"""

import ast
import re
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("natgrad", "natgrad_lab")
"""The library and its workbench."""


def modules(source: Path) -> dict[str, Path]:
    """Every module below a source folder by its dotted name."""
    found = {}
    for path in sorted(source.rglob("*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(tree: ast.AST, name: str, is_package: bool, known: set[str]) -> set[str]:
    """The known modules that a module imports when it is loaded or for its types."""
    found: set[str] = set()
    for node in loaded(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = name.split(".")
                parts = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parts, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                found.add(full if full in known else base)
    return {module for module in found & known if module != name}


def loaded(node: ast.AST):
    """The import statements outside functions, those under TYPE_CHECKING included."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child
        yield from loaded(child)


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Circles of imports."""
    found: list[list[str]] = []
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> None:
        if name in path:
            found.append([*path[path.index(name) :], name])
        elif name not in done:
            for other in sorted(graph[name]):
                visit(other, [*path, name])
            done.add(name)

    for name in sorted(graph):
        visit(name, [])
    return found


def import_graph(source: Path) -> dict[str, set[str]]:
    """Who imports whom when loaded."""
    found = modules(source)
    graph = {}
    for name, path in found.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        graph[name] = imports(tree, name, path.name == "__init__.py", set(found))
    return graph


def inside(source: Path, package: str) -> list[Path]:
    """The files of one package that have a name of their own."""
    return [
        path
        for name, path in modules(source).items()
        if name.split(".")[0] == package and path.name not in ("__init__.py", "__main__.py")
    ]


def homonyms(files: Iterable[Path], root: Path) -> list[str]:
    """Files of one name, and public classes of one name, told by their paths below `root`."""
    named: dict[str, list[Path]] = {}
    classes: dict[str, list[Path]] = {}
    for path in files:
        named.setdefault(path.name, []).append(path)
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                classes.setdefault(node.name, []).append(path)
    found = [("two files are called", name, where) for name, where in named.items()]
    found += [("two classes are called", name, where) for name, where in classes.items()]
    return [
        f"{what} {name}: {', '.join(path.relative_to(root).as_posix() for path in where)}"
        for what, name, where in found
        if len(where) > 1
    ]


def missing(pages: Iterable[Path], files: Iterable[Path]) -> list[str]:
    """Python files that a page names in backticks and that do not exist."""
    known = ["/" + path.as_posix() for path in files]
    return [
        f"{page.name} names {name}, which does not exist"
        for page in pages
        for name in re.findall(r"`([\w./-]+\.py)`", page.read_text(encoding="utf-8"))
        if name != "./mine.py" and not any(path.endswith("/" + name) for path in known)
    ]


REFERENCED = ("natgrad", "natgrad.curvature", "natgrad.layers", "natgrad.optim", "natgrad.parallel", "natgrad.refresh")
"""The modules whose `__all__` the site documents."""


def public_names() -> dict[str, set[str]]:
    """Every public name with the entries that a page may have: module.name, or longer where a file has that name."""
    found = modules(ROOT / "src")
    named: dict[str, set[str]] = {}
    for module in REFERENCED:
        for node in ast.parse(found[module].read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and any(getattr(t, "id", "") == "__all__" for t in node.targets):
                for name in ast.literal_eval(node.value):
                    named.setdefault(name, set()).update((f"{module}.{name}", f"{module}.{name}.{name}"))
    return named


def documented() -> set[str]:
    """The names that a page of the site has an entry for (`::: natgrad.SPNGD`)."""
    pages = (ROOT / "docs").rglob("*.md")
    return {name for page in pages for name in re.findall(r"^::: ([\w.]+)$", page.read_text(encoding="utf-8"), re.M)}


def undocumented() -> list[str]:
    """Public names without an entry on a page, under any of the modules that offer them."""
    known = documented()
    return [
        f"no page has an entry for {' or '.join(sorted(names))}"
        for names in public_names().values()
        if not names & known
    ]


def main() -> int:
    offences = [f"import cycle: {' -> '.join(circle)}" for circle in cycles(import_graph(ROOT / "src"))]
    for package in PACKAGES:
        offences += homonyms(inside(ROOT / "src", package), ROOT)
    ours = [
        path for folder in ("src", "tests", "benchmarks", "examples", "tools") for path in (ROOT / folder).rglob("*.py")
    ]
    offences += missing([*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md"], ours)
    offences += undocumented()
    for line in offences:
        print(line)
    return 1 if offences else 0


if __name__ == "__main__":
    sys.exit(main())
