"""What `house.py` reads out of a code base with `ast`: sizes, imports, shapes of functions and classes."""

from __future__ import annotations

import ast
import io
import math
import re
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

HTTP_VERBS = frozenset({"get", "post", "put", "patch", "delete", "head", "options", "websocket"})
BROAD_ERRORS = frozenset({"Exception", "BaseException"})
COMMENTS = {
    "type_ignore": re.compile(r"#\s*type:\s*ignore\b"),
    "noqa": re.compile(r"#\s*noqa\b"),
    "todo": re.compile(r"\b(TODO|FIXME|XXX)\b"),
}

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Import:
    """One import of a module of the code base; a lazy one stands inside a function."""

    importer: str
    imported: str
    line: int
    lazy: bool


@dataclass(frozen=True)
class Function:
    """One function or method, its length without its docstring and the number of its parameters without self."""

    file: str
    line: int
    name: str
    num_lines: int
    num_parameters: int
    is_public: bool
    is_route: bool
    has_docstring: bool
    has_return_annotation: bool


@dataclass(frozen=True)
class Class:
    """One class and the number of methods written in it; inherited ones are not counted."""

    file: str
    line: int
    name: str
    num_methods: int
    is_public: bool
    has_docstring: bool


@dataclass(frozen=True)
class Source:
    """One file of the code base, read."""

    file: str
    module: str
    num_lines: int
    functions: tuple[Function, ...]
    classes: tuple[Class, ...]
    defined_names: frozenset[str]
    counts: Mapping[str, int]
    tree: ast.Module


def read_sources(root: Path, packages: Sequence[str]) -> list[Source]:
    """Read every Python file of the packages below root; folders called `tests` are left out."""
    paths = sorted(path for package in packages for path in (root / package).rglob("*.py"))
    return [read_source(root, path) for path in paths if "tests" not in path.relative_to(root).parts]


def read_source(root: Path, path: Path) -> Source:
    """Read one file.

    Raises:
      SyntaxError: the file is not Python.
    """
    file = path.relative_to(root)
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text, filename=str(file))
    functions, classes = _definitions(tree, file)
    parts = file.parent.parts if file.name == "__init__.py" else file.with_suffix("").parts
    return Source(
        file=file.as_posix(),
        module=".".join(parts),
        num_lines=len(text.splitlines()),
        functions=tuple(functions),
        classes=tuple(classes),
        defined_names=frozenset(_top_names(tree)),
        counts=_counts(tree, text),
        tree=tree,
    )


def _definitions(tree: ast.Module, file: Path) -> tuple[list[Function], list[Class]]:
    functions: list[Function] = []
    classes: list[Class] = []

    def visit(node: ast.AST, public: bool, in_class: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, FunctionNode):
                functions.append(_function(child, file, public, in_class))
                visit(child, False, False)  # what is defined inside a function is not public
            elif isinstance(child, ast.ClassDef):
                classes.append(_class(child, file, public))
                visit(child, public and not child.name.startswith("_"), True)
            else:
                visit(child, public, in_class)

    visit(tree, True, False)
    return functions, classes


def _function(node: FunctionNode, file: Path, public: bool, in_class: bool) -> Function:
    arguments = [*node.args.posonlyargs, *node.args.args]
    bound = in_class and "staticmethod" not in map(_last_name, node.decorator_list)
    return Function(
        file=file.as_posix(),
        line=node.lineno,
        name=node.name,
        num_lines=node.end_lineno - node.lineno + 1 - _docstring_lines(node),
        num_parameters=len(arguments) - (bound and bool(arguments)) + len(node.args.kwonlyargs),
        is_public=public and not node.name.startswith("_"),
        is_route="routes" in file.stem or any(map(_is_http_verb, node.decorator_list)),
        has_docstring=ast.get_docstring(node) is not None,
        has_return_annotation=node.returns is not None,
    )


def _class(node: ast.ClassDef, file: Path, public: bool) -> Class:
    return Class(
        file=file.as_posix(),
        line=node.lineno,
        name=node.name,
        num_methods=sum(isinstance(member, FunctionNode) for member in node.body),
        is_public=public and not node.name.startswith("_"),
        has_docstring=ast.get_docstring(node) is not None,
    )


def _docstring_lines(node: FunctionNode) -> int:
    if ast.get_docstring(node) is None:
        return 0
    return node.body[0].end_lineno - node.body[0].lineno + 1


def _last_name(decorator: ast.expr) -> str:
    return ast.unparse(decorator).split("(")[0].rpartition(".")[2]


def _is_http_verb(decorator: ast.expr) -> bool:
    return (
        isinstance(decorator, ast.Call)
        and isinstance(decorator.func, ast.Attribute)
        and decorator.func.attr in HTTP_VERBS
    )


def _top_names(tree: ast.Module) -> Iterator[str]:
    """Yield the names of classes, functions, aliases and constants that a module defines at its top."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name
        elif isinstance(node, ast.Assign):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id


def _counts(tree: ast.Module, text: str) -> Counter[str]:
    counts: Counter[str] = Counter()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute):
            counts["any"] += (node.id if isinstance(node, ast.Name) else node.attr) == "Any"
        elif isinstance(node, ast.Assert):
            counts["assert"] += 1
        elif isinstance(node, ast.ExceptHandler):
            caught = ast.walk(node.type) if node.type is not None else ()
            names = {part.id for part in caught if isinstance(part, ast.Name)}
            counts["except_exception"] += node.type is None or bool(names & BROAD_ERRORS)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            counts.update(kind for kind, pattern in COMMENTS.items() if pattern.search(token.string))
    return counts


def imports_among(sources: Sequence[Source]) -> list[Import]:
    """Return the imports of one source by another; those under `if TYPE_CHECKING` do not run and do not count."""
    modules = {source.module for source in sources}
    found = []
    for source in sources:
        for line, lazy, name in _imported_names(source.tree, lazy=False):
            imported = name if name in modules else name.rpartition(".")[0]
            if imported in modules and imported != source.module:
                found.append(Import(source.module, imported, line, lazy))
    return found


def _imported_names(node: ast.AST, lazy: bool) -> Iterator[tuple[int, bool, str]]:
    if isinstance(node, ast.Import):
        yield from ((node.lineno, lazy, alias.name) for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module is not None and not node.level:
        yield from ((node.lineno, lazy, f"{node.module}.{alias.name}") for alias in node.names)
    elif isinstance(node, ast.If) and _last_name(node.test) == "TYPE_CHECKING":
        for child in node.orelse:
            yield from _imported_names(child, lazy)
    else:
        for child in ast.iter_child_nodes(node):
            yield from _imported_names(child, lazy or isinstance(node, FunctionNode | ast.Lambda))


def circles(imports: Iterable[Import]) -> list[frozenset[str]]:
    """Return the groups of more than one module that reach each other by imports, the largest first."""
    following: dict[str, set[str]] = {}
    for found in imports:
        following.setdefault(found.importer, set()).add(found.imported)
    reached = {module: _reached_from(module, following) for module in following}
    groups = {
        frozenset(other for other in reached[module] if module in reached.get(other, ()))
        for module in following
        if module in reached[module]
    }
    return sorted(groups, key=lambda group: (-len(group), sorted(group)))


def _reached_from(start: str, following: Mapping[str, set[str]]) -> set[str]:
    reached: set[str] = set()
    waiting = [start]
    while waiting:
        for module in following.get(waiting.pop(), ()):
            if module not in reached:
                reached.add(module)
                waiting.append(module)
    return reached


def two_way_pairs(sources: Sequence[Source], imports: Iterable[Import]) -> list[tuple[str, str]]:
    """Return the pairs of rooms that import each other.

    A room is a package at the root or, where such a package holds packages, each of these; the modules next to
    them are a room of their own under the name of the package at the root. A package and a package inside it are
    no pair: what they share lies in the outer one.
    """
    rooms = {source.module: _room(source) for source in sources}
    arrows = {(rooms[found.importer], rooms[found.imported]) for found in imports}
    return sorted(
        (one, other)
        for one, other in arrows
        if one < other and (other, one) in arrows and not other.startswith(f"{one}.")
    )


def _room(source: Source) -> str:
    folders = Path(source.file).parent.parts
    return ".".join(folders[:2])


def files_per_folder(sources: Iterable[Source]) -> Counter[str]:
    """Count the modules that lie directly in each folder, `__init__.py` apart."""
    paths = (Path(source.file) for source in sources)
    return Counter(path.parent.as_posix() for path in paths if path.name != "__init__.py")


def at_share(values: Iterable[int], share: float) -> int:
    """Return the smallest value that at least this share of the values does not exceed; 0 without values."""
    ordered = sorted(values)
    return ordered[math.ceil(share * len(ordered)) - 1] if ordered else 0
