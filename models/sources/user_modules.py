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
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType

_PROTECTED = frozenset({"__main__", __name__.partition(".")[0]})


def _installed_roots() -> tuple[Path, ...]:
    names = {sysconfig.get_path(key) for key in ("purelib", "platlib", "stdlib", "platstdlib")}
    names |= {*site.getsitepackages(), site.getusersitepackages()}
    # and those that a .pth file or PYTHONPATH adds
    names |= {entry for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")}
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


class EditedError(ValueError):
    """A file was about to be imported again in another version than the one that is in use, see `imports_held`."""


class Workspace:
    """Folders whose modules belong together; see the module's text."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = tuple(dict.fromkeys(folders))
        self._claimed: set[str] = set()
        self._aside: dict[str, ModuleType] = {}
        self._digests: dict[Path, str] = {}

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

    def owns(self, name: str) -> bool:
        """Whether the top-level module `name` was loaded for this workspace."""
        return name in self._claimed

    def read(self, file: Path, digest: str) -> None:
        """Notes which content of `file` is in memory."""
        self._digests[file] = digest

    @property
    def loaded(self) -> Mapping[Path, str]:
        """sha256 of the content that every file had when it was imported."""
        return self._digests

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
        """Remembers the content of loaded files that are no Python text, see `bring_back`."""
        for name, module in list(sys.modules.items()):
            file = getattr(module, "__file__", None) if _top(name) in self._claimed else None
            if file and Path(file).resolve() not in self._digests:
                self._digests[Path(file).resolve()] = _digest(Path(file))

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


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""


class _Loader(SourceFileLoader):
    """Runs exactly the bytes whose digest it notes.

    Compiled files are left aside: a .pyc is valid by its second and its size, which is not safe for files that are
    edited in a loop.
    """

    def get_code(self, fullname: str) -> CodeType | None:
        """See `importlib.abc.InspectLoader`."""
        place = self.get_filename(fullname)
        try:
            content = self.get_data(place)
        except OSError as error:
            raise ImportError(f"{place} cannot be read: {error.strerror or error}", name=fullname, path=place) from None
        file, digest = Path(place).resolve(), hashlib.sha256(content).hexdigest()
        _state.hold(file, digest)
        if _state.active is not None:
            _state.active.read(file, digest)
        code: CodeType = self.source_to_code(content, place)
        return code


def _noting(spec: ModuleSpec | None) -> ModuleSpec | None:
    """`spec` with a loader that notes what it reads."""
    if spec is not None and type(spec.loader) is SourceFileLoader:
        spec.loader = _Loader(spec.loader.name, spec.loader.path)
    return spec


class _Finder:
    """A meta path finder that asks the active workspace first for top-level modules, and what is below its own."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See `importlib.abc.MetaPathFinder`."""
        if _state.active is None:
            return None
        if path is not None:
            return _noting(PathFinder.find_spec(name, path, target)) if _state.active.owns(_top(name)) else None
        spec = _state.active.spec_for(name)
        if spec is not None:
            _state.active.claim(name)
        return _noting(spec)


class _State:
    """The one active workspace of this process; `sys.modules` and `sys.path` allow no second."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.active: Workspace | None = None
        self.known: dict[tuple[Path, ...], Workspace] = {}
        self.on_path: list[str] = []
        self.finder = _Finder()
        self.held: dict[Path, str] | None = None
        self.found: dict[Hashable, tuple[Path, ...]] = {}

    def hold(self, file: Path, digest: str) -> None:
        """Refuses another content of `file` than the first one, while imports are held."""
        if self.held is not None and self.held.setdefault(file, digest) != digest:
            raise EditedError(
                f"{file} was edited while its first version was in use: run again, or take the edit back first"
            )


_state = _State()


@contextmanager
def imports_held() -> Iterator[Mapping[Path, str]]:
    """While it is open, a user's file can be imported in one version only.

    Yields:
        sha256 of every file that is in use, by its resolved path; grows with what is imported.
    """
    before = _state.held
    _state.held = {} if before is None else before
    try:
        yield _state.held
    finally:
        _state.held = before
        if before is None:
            _state.found.clear()


def once_while_held(key: Hashable, find: Callable[[], tuple[Path, ...]]) -> tuple[Path, ...]:
    """The files that `find` finds, looked for once for a `key` while `imports_held` is open; else each time."""
    if _state.held is None:
        return find()
    if key not in _state.found:
        _state.found[key] = find()
    return _state.found[key]


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
        # what else they import is not ours to litter
        before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
        try:
            yield workspace
            workspace.record()
            for file, digest in workspace.loaded.items():
                _state.hold(file, digest)
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
    made = _noting(importlib.util.spec_from_file_location(name, file))
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
