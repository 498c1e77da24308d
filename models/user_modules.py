"""Imports a user's own Python files so that their names mean their files, whatever else is loaded.

A *workspace* is a recipe's folder plus, for a reference to a file, the folder that file's imports start
from. While a workspace is active, the top-level modules and packages in its folders win over modules of the
same name from anywhere else but the standard library and installed packages that are already imported: users
call their packages ``models``, ``export`` or ``utils``, and so do we, our tests, and the next user.
Activating another workspace puts the modules of the first aside, so two recipes in one process do not mix;
the last one stays active.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import re
import site
import sys
import sysconfig
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

_PROTECTED = frozenset({"__main__", __name__.partition(".")[0]})


def _installed_roots() -> tuple[Path, ...]:
    names = {sysconfig.get_path(key) for key in ("purelib", "platlib", "stdlib", "platstdlib")}
    names |= {*site.getsitepackages(), site.getusersitepackages()}
    return tuple(Path(name).resolve() for name in sorted(filter(None, names)))


_INSTALLED = _installed_roots()


def _top(name: str) -> str:
    return name.partition(".")[0]


def _location(module: ModuleType) -> Path | None:
    """The module's file, or the folder of a namespace package; None for modules made in memory."""
    file = getattr(module, "__file__", None)
    if file:
        return Path(file).resolve()
    folders = list(getattr(module, "__path__", ()))
    return Path(folders[0]).resolve() if folders else None


def is_installed(path: Path) -> bool:
    """True for the standard library and everything in a site-packages folder of this interpreter."""
    return any(path.is_relative_to(root) for root in _INSTALLED)


def _names_installed(name: str) -> bool:
    spec = PathFinder.find_spec(name, [str(root) for root in _INSTALLED])
    return spec is not None and spec.loader is not None


class Workspace:
    """Folders whose modules belong together; see the module's text."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = tuple(dict.fromkeys(folders))
        self._claimed: set[str] = set()
        self._aside: dict[str, ModuleType] = {}
        self._digests: dict[Path, bytes] = {}

    def spec_for(self, name: str) -> ModuleSpec | None:
        """Where the top-level module `name` lies in these folders, or None if it does not or must not win."""
        if name in sys.stdlib_module_names or name in _PROTECTED:
            return None
        portions: list[str] = []
        for folder in self.folders:
            spec = PathFinder.find_spec(name, [str(folder)])
            if spec is not None and spec.loader is not None:
                return spec
            # a folder without __init__.py: only if it holds Python, a folder of pictures is no package
            if spec is not None and next((folder / name).rglob("*.py"), None) is not None:
                portions.append(str(folder / name))
        if not portions:
            return None
        # as Python has it, a real package wins over a namespace one; here only if it is an installed one
        if _names_installed(name):
            return None
        found = ModuleSpec(name, None, is_package=True)
        found.submodule_search_locations = portions
        return found

    def claim(self, name: str) -> None:
        """Notes that the top-level module `name` was loaded for this workspace."""
        self._claimed.add(name)

    def put_aside(self) -> None:
        """Takes this workspace's modules out of `sys.modules`."""
        for name in [n for n in sys.modules if _top(n) in self._claimed]:
            self._aside[name] = sys.modules.pop(name)

    def bring_back(self) -> None:
        """Evicts same-named modules from elsewhere and puts this workspace's modules into `sys.modules`."""
        importlib.invalidate_caches()
        self._drop_if_edited()
        loaded = {_top(name) for name in sys.modules} - self._claimed
        present = {entry.stem for folder in self.folders for entry in folder.iterdir()}
        for name in sorted(loaded & present):
            if self._is_foreign(name):
                for each in [n for n in sys.modules if _top(n) == name]:
                    del sys.modules[each]
        sys.modules.update(self._aside)
        self._aside.clear()

    def forget(self) -> None:
        """Drops every module of this workspace, so that the next import reads the files again."""
        self.put_aside()
        self._aside.clear()
        self._digests.clear()

    def record(self) -> None:
        """Remembers the content of the files that are loaded, see `bring_back`."""
        for name, module in list(sys.modules.items()):
            file = getattr(module, "__file__", None) if _top(name) in self._claimed else None
            if file and Path(file) not in self._digests:
                self._digests[Path(file)] = _digest(Path(file))

    def _drop_if_edited(self) -> None:
        # a notebook or a test edits its file and runs again: old code under the new file's hash would poison
        # caches
        if any(_digest(file) != digest for file, digest in self._digests.items()):
            self.forget()

    def _is_foreign(self, name: str) -> bool:
        module = sys.modules.get(name)
        if module is None:
            return any(_top(n) == name for n in sys.modules)
        where = _location(module)
        if where is not None and is_installed(where):
            return False
        spec = self.spec_for(name)
        if spec is None:
            return False
        ours = [spec.origin] if spec.loader is not None else list(spec.submodule_search_locations or ())
        return where not in {Path(place).resolve() for place in ours if place}


def _digest(file: Path) -> bytes:
    return hashlib.sha256(file.read_bytes()).digest() if file.is_file() else b""


class _Finder:
    """A meta path finder that asks the active workspace first for top-level modules."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """See `importlib.abc.MetaPathFinder`."""
        del target
        if _state.active is None or path is not None:
            return None
        spec = _state.active.spec_for(name)
        if spec is not None:
            _state.active.claim(name)
        return spec


class _State:
    """The one active workspace of this process; `sys.modules` and `sys.path` allow no second."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.active: Workspace | None = None
        self.known: dict[tuple[Path, ...], Workspace] = {}
        self.on_path: list[str] = []
        self.finder = _Finder()


_state = _State()


@contextmanager
def activated(root: Path, start: Path | None = None) -> Iterator[Workspace]:
    """Makes the modules in `start` and `root` importable, and keeps them so afterwards; one thread at a time.

    Args:
        root: the recipe's folder.
        start: where the imports of a referenced file start, looked at before `root`.
    """
    folders = tuple(dict.fromkeys(path.resolve() for path in (start or root, root)))
    with _state.lock:
        workspace = _state.known.setdefault(folders, Workspace(folders))
        if _state.finder not in sys.meta_path:
            sys.meta_path.insert(0, _state.finder)
        if _state.active is not None:
            _state.active.put_aside()
        # sys.path too: worker processes inherit it. Other starts of the same root stay reachable for late
        # imports
        siblings = [f for known in _state.known.values() if known.folders[-1] == folders[-1] for f in known.folders]
        sys.path[:] = [entry for entry in sys.path if entry not in _state.on_path]
        wanted = [str(folder) for folder in dict.fromkeys((*folders, *siblings))]
        _state.on_path = [entry for entry in wanted if entry not in sys.path]
        sys.path[:0] = _state.on_path
        workspace.bring_back()
        _state.active = workspace
        # a .pyc is valid by its second and its size: not safe for files edited in a loop, and not ours to
        # litter
        before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
        try:
            yield workspace
            workspace.record()
        finally:
            sys.dont_write_bytecode = before


def start_of(file: Path) -> tuple[Path, str]:
    """The folder from which `file` is imported, and its dotted name there: packages around it are climbed."""
    folder, parts = file.parent, [file.stem]
    while (folder / "__init__.py").is_file() and folder.parent != folder:
        parts.insert(0, folder.name)
        folder = folder.parent
    if parts[-1] == "__init__" and len(parts) > 1:
        parts.pop()
    return folder, ".".join(parts)


def import_file(file: Path, workspace: Workspace) -> ModuleType:
    """Imports one file under its own name, or under a made-up one where that name belongs to another module.

    Args:
        file: a Python file, resolved.
        workspace: the active one, whose first folder is `start_of(file)`.
    """
    _, name = start_of(file)
    if all(part.isidentifier() for part in name.split(".")) and not _names_installed(_top(name)):
        spec = workspace.spec_for(_top(name))
        where = spec.origin or next(iter(spec.submodule_search_locations or ()), None) if spec else None
        if where is not None and Path(where).resolve().is_relative_to(workspace.folders[0]):
            module = importlib.import_module(name)
            if _location(module) == file:
                return module
    plain, unique = re.sub(r"[^0-9A-Za-z_]", "_", file.stem), hashlib.sha256(str(file).encode()).hexdigest()
    name = f"user_{plain}_{unique[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    made = importlib.util.spec_from_file_location(name, file)
    if made is None or made.loader is None:
        raise ImportError(f"{file} is not a Python file")
    module = importlib.util.module_from_spec(made)
    workspace.claim(name)
    sys.modules[name] = module
    try:
        made.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
