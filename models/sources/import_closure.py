"""Which files a Python file is made of, read from its text: what a cache key has to cover.

Read statically, not from `sys.modules`: the answer must not depend on what ran before, and must hold imports
inside functions that have not run yet.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from pathlib import Path

_DYNAMIC = frozenset({"import_module", "__import__", "exec", "run_path", "run_module", "spec_from_file_location"})


def import_closure(file: Path, folders: Sequence[Path], limits: Sequence[Path] | None = None) -> tuple[Path, ...]:
    """`file` and every Python file below `folders` that it imports, directly or not, sorted.

    A file that imports by a computed name may need any other: then all Python files below the last of
    `folders` belong to the answer.

    Args:
        file: where to begin.
        folders: where absolute imports are looked up, in order.
        limits: files and folders outside which nothing is followed, default `folders`.
    """
    limits = folders if limits is None else limits
    found: set[Path] = set()
    waiting = [file.resolve()]
    while waiting:
        current = waiting.pop()
        if current in found or not any(current.is_relative_to(limit) for limit in limits):
            continue
        found.add(current)
        try:
            tree = ast.parse(current.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue  # importing it will say what is wrong
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and _imports_by_computed_name(node):
                waiting += _all_python_files(folders[-1])
            waiting += _imported(node, current, folders)
    return tuple(sorted(found))


def _imported(node: ast.AST, file: Path, folders: Sequence[Path]) -> Iterator[Path]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield from _files_of(alias.name, folders)
    elif isinstance(node, ast.ImportFrom):
        bases = list(folders)
        if node.level:
            bases = [file.parents[node.level - 1]] if node.level <= len(file.parents) else []
        for base in bases:
            if node.level and (base / "__init__.py").is_file():
                yield (base / "__init__.py").resolve()
        yield from _files_of(node.module or "", bases)
        for alias in node.names:
            yield from _files_of(".".join(filter(None, (node.module, alias.name))), bases)
    elif isinstance(node, ast.Call) and _called(node) in _DYNAMIC and node.args:
        name = node.args[0]
        if isinstance(name, ast.Constant) and isinstance(name.value, str):
            yield from _files_of(name.value, folders)


def _files_of(dotted: str, folders: Sequence[Path]) -> Iterator[Path]:
    """The ``__init__.py`` files on the way and the module's own file, in the first folder that has them."""
    parts = [part for part in dotted.split(".") if part]
    for folder in folders:
        passed: list[Path] = []
        place = folder
        for part in parts:
            place = place / part
            candidates = (place / "__init__.py", place.with_name(part + ".py"))
            passed += [c.resolve() for c in candidates if c.is_file()][:1]
        if passed:
            yield from passed
            return


def _called(node: ast.Call) -> str:
    if isinstance(node.func, ast.Attribute):
        return node.func.attr
    return node.func.id if isinstance(node.func, ast.Name) else ""


def _imports_by_computed_name(node: ast.Call) -> bool:
    # `exec` is also the name of a method here and there; more files in a key than needed do no harm
    return _called(node) in _DYNAMIC and not (node.args and isinstance(node.args[0], ast.Constant))


def _all_python_files(folder: Path) -> Iterator[Path]:
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith(".") or entry.name in {"__pycache__", "site-packages", "node_modules"}:
            continue
        if entry.is_dir() and not entry.is_symlink() and not (entry / "pyvenv.cfg").exists():
            yield from _all_python_files(entry)
        elif entry.suffix == ".py":
            yield entry.resolve()
