"""Which source files a result depends on, and their hashes."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
from collections.abc import Iterable, Iterator
from pathlib import Path

PACKAGE = "edgewright"


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def file_digests(paths: Iterable[Path], root: Path) -> dict[str, str]:
    """sha256 of every file, by a name that is the same on every machine.

    Args:
        paths: the files.
        root: the user's folder; files below it are named relative to it, others by their last two parts.
    """
    return dict(sorted((portable_name(path, root), sha256_of(path)) for path in paths))


def portable_name(path: Path, root: Path) -> str:
    """What a file is called in keys: relative to `root` if it lies below it, else its last two parts."""
    whole, base = path.resolve(), root.resolve()
    return (whole.relative_to(base) if whole.is_relative_to(base) else Path(*whole.parts[-2:])).as_posix()


def content_digest(path: Path) -> str:
    """Hex blake2b of 16 bytes of a file's content: what `FromFiles` tells of data files.

    Raises:
        OSError: it cannot be read.
    """
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def module_digests(*modules: str) -> dict[str, str]:
    """sha256 of the sources of `modules` and of every module of ours that they import, directly or not.

    A module of another package counts likewise, with the modules of its package and ours that it imports.

    The imports are read from the text, so those inside functions count too; those under ``if TYPE_CHECKING``
    do not. A package among `modules` counts with all its modules, because it may choose among them by name.
    The ``__init__`` of a package on the way to a module is left out unless something is imported from it: it
    runs, and can hand nothing over.
    """
    roots = frozenset({PACKAGE, *(name.partition(".")[0] for name in modules)})
    waiting, found = list(modules), dict[str, str]()
    for name in modules:
        waiting += _modules_below(name)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        path = _file_of(name)
        if path is None:
            continue
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        found[name], imported = _own_source(path, package, roots)
        waiting += imported
    return dict(sorted(found.items()))


def own_sources() -> dict[Path, str]:
    """sha256 of every source file of ours that a digest was asked for, as it was then: what this process runs."""
    return dict(_own)


_own: dict[Path, str] = {}


@functools.cache
def _own_source(path: Path, package: str, roots: frozenset[str]) -> tuple[str, tuple[str, ...]]:
    """sha256 of a source file, and what it imports below `roots`; read once, because its code is imported once."""
    text = path.read_bytes()
    _own[path] = hashlib.sha256(text).hexdigest()
    return _own[path], tuple(_imports(ast.parse(text), package, roots))


def _modules_below(name: str) -> list[str]:
    path = _file_of(name)
    if path is None or path.name != "__init__.py":
        return []
    folder = path.parent
    inside = (p.relative_to(folder).with_suffix("").parts for p in sorted(folder.rglob("*.py")))
    return [".".join((name, *(part for part in parts if part != "__init__"))) for parts in inside]


def _imports(tree: ast.AST, package: str, roots: frozenset[str] = frozenset({PACKAGE})) -> Iterator[str]:
    for node in _executed(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if _is_below(alias.name, roots))
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                source = ".".join([*above, source] if source else above)
            if not _is_below(source, roots):
                continue
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                yield inner if _file_of(inner) is not None else source
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called == "import_module" and _is_below(str(node.args[0].value), roots):
                yield str(node.args[0].value)


def _executed(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below `node` except the bodies of ``if TYPE_CHECKING``."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            for other in child.orelse:
                yield other
                yield from _executed(other)
            continue
        yield child
        yield from _executed(child)


def _is_below(name: str, roots: frozenset[str]) -> bool:
    top, _, rest = name.partition(".")
    return top in roots and (bool(rest) or top != PACKAGE)  # `edgewright` alone is a namespace: it has no code


def _file_of(name: str) -> Path | None:
    """The source file of a module of ours or of another package, found without importing anything."""
    parts = name.split(".")
    if parts[0] != PACKAGE:
        base, rest = parts[0], parts[1:]
    elif len(parts) > 1:
        base, rest = f"{PACKAGE}.{parts[1]}", parts[2:]
    else:
        return None
    spec = importlib.util.find_spec(base)
    if spec is None or spec.origin is None:
        return None
    origin = Path(spec.origin)
    if not rest:
        return origin if origin.suffix == ".py" else None
    folder = origin.parent.joinpath(*rest)
    return next((c for c in (folder / "__init__.py", folder.with_suffix(".py")) if c.is_file()), None)
