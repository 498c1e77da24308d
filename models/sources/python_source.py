"""Functions that a recipe names: ``python:package.module:function``, ``python:path/to/file.py:function``."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from .import_closure import import_closure
from .user_modules import EditedError, activated, import_file, is_installed, once_while_held, start_of

PREFIX = "python:"
_LIBRARIES = ("torch", "numpy")
"""Whose functions are no models; a network of torch is one."""
_OURS, _ROOMS = Path(__file__).resolve().parents[2], ("models", "pipeline", "export", "edge_runtime")


@dataclass(frozen=True)
class LoadedObject:
    """What a reference stands for.

    Attributes:
        object: the function or class; callable.
        file: the file of the module that was named.
        folders: where its absolute imports are looked up, in order.
        limits: files and folders outside which its imports are not followed.
    """

    object: Any
    file: Path
    folders: tuple[Path, ...]
    limits: tuple[Path, ...]

    @property
    def sources(self) -> tuple[Path, ...]:
        """`file` and every file of the user's that it imports, sorted; their content belongs to a cache key.

        While `imports_held` is open they are looked for once: the files can only be imported as they are, and whoever
        compares their digests sees an edit.
        """
        return once_while_held(
            (self.file, self.folders, self.limits), lambda: import_closure(self.file, self.folders, self.limits)
        )


def load_object(reference: str, root: Path) -> LoadedObject:
    """Imports what `reference` names.

    The folder `root`, and for a file reference the folder from which that file would be imported, become
    importable and stay so until a reference with another root is loaded. A file that was edited since is
    read again.

    Args:
        reference: ``python:package.module:function`` or ``python:path/to/file.py:function``; the function
            may be a class, or dotted (``Net.small``).
        root: the recipe's folder; relative paths are resolved against it.

    Raises:
        ValueError: no such file, module or attribute, a syntax error, or the module raised while it was
            imported.
    """
    return _load(reference, root)


def call(reference: str, args: Mapping[str, Any], root: Path) -> Any:
    """Imports what `reference` names and calls it with `args` as keywords.

    Args:
        reference: see `load_object`.
        args: keyword arguments.
        root: the recipe's folder.

    Raises:
        ValueError: as `load_object`, or `args` do not fit the signature. What the function itself raises
            passes.
    """
    loaded = _load(reference, root)
    check_arguments(loaded.object, args, reference)
    start = start_of(loaded.file)[0] if _is_file(reference) else None
    with activated(root.resolve(), start):
        return loaded.object(**args)


def check_arguments(function: Callable[..., Any], args: Mapping[str, Any], name: str) -> None:
    """Refuses keyword arguments that do not fit the signature of `function`.

    Args:
        function: what is going to be called.
        args: keyword arguments.
        name: how the recipe calls it, for the message.

    Raises:
        ValueError: names the argument that is unknown or missing.
    """
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # some builtins have no signature: Python will check
        return
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    known = [p.name for p in parameters.values() if p.kind in named]
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        refuse_unknown_arguments(args, known, name)
    for parameter in parameters.values():
        if parameter.default is not inspect.Parameter.empty:
            continue
        if parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
            raise ValueError(f"{name} takes {parameter.name!r} by position only; a recipe passes arguments by name")
        if parameter.kind in named and parameter.name not in args:
            raise ValueError(f"{name} needs the argument {parameter.name!r}: give it under args")


def refuse_unknown_arguments(args: Mapping[str, Any], known: list[str], name: str) -> None:
    """Raises ValueError for the first key of `args` that is not among `known`, with the nearest one."""
    for key in args:
        if key not in known:
            takes = f"it takes: {', '.join(known)}" if known else "it takes none"
            raise ValueError(f"{name} has no argument {key!r}{did_you_mean(key, known)}; {takes}")


def did_you_mean(word: str, known: list[str]) -> str:
    """`` (did you mean 'x'?)`` for the entries of `known` closest to `word`, or nothing."""
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    close += [k for k in known if word and word.lower() in k.lower() and k not in close][: 3 - len(close)]
    return f" (did you mean {' or '.join(map(repr, close))}?)" if close else ""


def place_of(error: BaseException) -> str:
    """`` in net.py, line 7`` for the last line of `error`'s traceback that is not in an installed package."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not f.filename.startswith("<") and _is_users(Path(f.filename))]
    return f" in {own[-1].filename}, line {own[-1].lineno}" if own else ""


def _is_users(path: Path) -> bool:
    path = path.resolve()
    return not is_installed(path) and not any(path.is_relative_to(_OURS / name) for name in _ROOMS)


def _is_file(reference: str) -> bool:
    return reference.removeprefix(PREFIX).rpartition(":")[0].endswith(".py")


def _load(reference: str, root: Path) -> LoadedObject:
    root = root.resolve()
    target, colon, attribute = reference.removeprefix(PREFIX).rpartition(":")
    if not reference.startswith(PREFIX) or not colon or not target or not attribute:
        raise ValueError(
            f"{reference!r} is no reference to Python code: write python:package.module:function "
            "or python:path/to/file.py:function"
        )
    if not root.is_dir():
        raise ValueError(f"{reference}: the folder {root} does not exist")
    file = _existing_file(reference, target, root) if _is_file(reference) else None
    if file is None and target.partition(".")[0] in sys.stdlib_module_names:
        raise ValueError(
            f"{reference}: {target.partition('.')[0]!r} is a module of Python itself, and a recipe names a function of "
            "yours; if it is a folder or file of yours, write python:path/to/file.py:function, or rename it"
        )
    start = start_of(file)[0] if file else None
    with activated(root, start) as workspace:
        try:
            module = import_file(file, workspace) if file else importlib.import_module(target)
        except EditedError:
            raise
        except (Exception, SystemExit) as error:
            workspace.forget()
            raise ValueError(_why(error, reference, target, root)) from error
        found = _attribute(module, attribute, reference)
    _check_origin(found, reference)
    where = Path(getattr(module, "__file__", None) or inspect.getfile(found)).resolve()
    folders, limits = list(workspace.folders), list(workspace.folders)
    if not any(where.is_relative_to(folder) for folder in folders):
        # a package from elsewhere counts whole, its neighbours in site-packages do not
        start, name = start_of(where)
        folders.insert(0, start)
        limits.append(start / name.partition(".")[0] if "." in name or where.stem == "__init__" else where)
    return LoadedObject(found, where, tuple(folders), tuple(limits))


def _check_origin(found: Any, reference: str) -> None:
    """Refuses what a recipe has no business to call with its arguments: eval, os.system, torch.load, ..."""
    made = found
    while isinstance(made, functools.partial):
        made = made.func
    made = inspect.unwrap(getattr(made, "__func__", made))
    named = made if isinstance(made, type) or inspect.isroutine(made) else type(made)
    origin = getattr(named, "__module__", None) or "builtins"
    top = origin.partition(".")[0]
    if top == "torch" and isinstance(made, type) and issubclass(made, nn.Module):
        return
    if top in sys.stdlib_module_names or top in _LIBRARIES:
        raise ValueError(
            f"{reference}: that is {origin}.{getattr(named, '__qualname__', named)}, no function of yours; a recipe "
            "names a function or class that makes what is needed: write one that calls it"
        )


def _existing_file(reference: str, target: str, root: Path) -> Path:
    file = (root / Path(target).expanduser()).resolve()
    if not file.is_file():
        near = [path.name for path in file.parent.glob("*.py")] if file.parent.is_dir() else []
        raise ValueError(
            f"{reference}: there is no file {file}{did_you_mean(file.name, near)}; "
            f"paths are relative to the recipe's folder {root}"
        )
    return file


def _why(error: BaseException, reference: str, target: str, root: Path) -> str:
    """What went wrong while a user's module was imported, in words for that user."""
    if isinstance(error, SyntaxError):
        text = f": {error.text.strip()}" if error.text else ""
        return f"{reference}: {error.filename}, line {error.lineno} is not valid Python ({error.msg}){text}"
    if isinstance(error, SystemExit):
        return (
            f"{reference}: the module ends the program while it is imported{place_of(error)}; put what it "
            'runs as a script under `if __name__ == "__main__":`'
        )
    if isinstance(error, ModuleNotFoundError):
        missing = error.name or ""
        if not _is_file(reference) and (target == missing or target.startswith(missing + ".")):
            return (
                f"{reference}: there is no module {missing!r} in the recipe's folder {root}, and none is "
                f"installed; for a file write python:path/to/file.py:function ({error})"
            )
        return (
            f"{reference}: the import of {missing!r}{place_of(error)} found no such module in {root} nor "
            f"among the installed packages; put it into the recipe's folder or install it ({error})"
        )
    return f"{reference}: {type(error).__name__} while the module was imported{place_of(error)}: {error}"


def _attribute(module: ModuleType, attribute: str, reference: str) -> Any:
    found: Any = module
    for part in attribute.split("."):
        if part.startswith("__"):
            raise ValueError(f"{reference}: {part!r} belongs to Python itself; name a function or a class")
        if not hasattr(found, part):
            names = [n for n, v in vars(found).items() if callable(v) and not n.startswith("_")]
            raise ValueError(
                f"{reference}: {getattr(module, '__file__', None) or module.__name__} has no {part!r}"
                f"{did_you_mean(part, names)}"
            )
        found = getattr(found, part)
    if not callable(found):
        raise ValueError(f"{reference}: {attribute!r} is a {type(found).__name__}, not a function or a class")
    return found
