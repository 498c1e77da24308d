"""Code of other libraries, tried in a process of its own: a kernel that ends the process is a reason, and no end.

Most models are PyTorch and Python alone, and are looked into here. A kernel of another library may not check what it is
given: NaN in place of a number, fewer channels than before. The process is a fork, so that it needs no import and has
the user's classes, and it computes in one thread, because the threads of this process are not in it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib.machinery
import mmap
import os
import pickle
import select
import signal
import sys
import time
import traceback
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import nn

from ...errors import StageError

T = TypeVar("T")

_SILENCE_S = 180.0
"""So long no module begins or ends before the process counts as hanging."""
_MOST_TRIES = 12
_PLACE = 4096
_TRUSTED = frozenset(
    ("torch", "torchvision", "torchaudio", "numpy", "scipy", "transformers", "timm", "einops", "edgewright", "PIL")
) | (sys.stdlib_module_names - {"ctypes", "_ctypes"})
"""Packages whose compiled code checks what it is given."""


@dataclass(frozen=True)
class Care:
    """How a model is looked into.

    Attributes:
        apart: in a process of its own, or of PyTorch's code alone.
        operators: marks are kept out of operators of other libraries.
        closed: paths of modules that marks are kept out of, with all that is inside.
        streams: layers may be given noise, to see which are added.
    """

    apart: bool = False
    operators: bool = False
    closed: frozenset[str] = frozenset()
    streams: bool = True

    def shuts(self, path: str) -> bool:
        """Whether `path` is a closed module or inside one."""
        return any(path == closed or path.startswith(f"{closed}.") for closed in self.closed)


class ForeignCodeError(Exception):
    """The model runs compiled code of another library; nothing was tried with it yet."""


class EndedError(Exception):
    """The process ended, or hung, while a module was running.

    Attributes:
        place: its path.
        how: in words.
    """

    def __init__(self, place: str, how: str) -> None:
        super().__init__(f"{how} in {place!r}")
        self.place, self.how = place, how


def looked_into(model: nn.Module, look: Callable[[Care], T]) -> T:
    """What `look` finds in `model`, with as much care as the model needs.

    Args:
        model: unchanged.
        look: finds it, and raises `ForeignCodeError` where it meets code of other libraries without being apart.

    Raises:
        EndedError: with all care, the process ended.
    """
    care = Care()
    if not hasattr(os, "fork"):
        return look(replace(care, apart=True))
    if not compiled_code(model):
        try:
            return look(care)
        except ForeignCodeError:
            pass
    care = replace(care, apart=True)
    for _ in range(_MOST_TRIES):
        try:
            return in_a_process(model, lambda care=care: look(care))  # type: ignore[misc]
        except EndedError as ended:
            if not care.operators:
                care = replace(care, operators=True)
            elif ended.place and not care.shuts(ended.place):
                care = replace(care, closed=care.closed | {ended.place})
            elif care.streams:
                care = replace(care, streams=False)
            else:
                raise
    raise EndedError("", f"{_MOST_TRIES} times another module ended the process")


def in_a_process(model: nn.Module, work: Callable[[], T]) -> T:
    """What `work` returns or raises, in a fork of this process that may end.

    Args:
        model: `work` runs it, or copies of it.
        work: returns something that can be pickled.

    Raises:
        EndedError: the process ended otherwise, or hung.
    """
    board = mmap.mmap(-1, _PLACE)
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        # Python warns of forks beside threads, of which the child uses none
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        _run_child(model, work, board, writer)
    os.close(writer)
    try:
        data = _read(reader, board, child)
        _, status = os.waitpid(child, 0)
    except BaseException:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise
    finally:
        os.close(reader)
    if not data:
        raise EndedError(_read_place(board), _how(status))
    result, error = pickle.loads(data)
    if error is not None:
        raise error
    found: T = result
    return found


def _run_child(model: nn.Module, work: Callable[[], Any], board: mmap.mmap, writer: int) -> None:
    """Never returns."""
    try:
        faulthandler.disable()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        torch.set_num_threads(1)
        try:
            with _noted(model, board):
                answer: tuple[Any, Any] = work(), None
        except Exception as error:
            answer = None, error
        try:
            data = pickle.dumps(answer)
            pickle.loads(data)  # exceptions may refuse only that
        except Exception:
            text = "".join(traceback.format_exception_only(answer[1])).strip() if answer[1] else "no answer"
            data = pickle.dumps((None, StageError(text)))
        while data:
            data = data[os.write(writer, data) :]
    finally:
        os._exit(0)


@contextlib.contextmanager
def _noted(model: nn.Module, board: mmap.mmap) -> Iterator[None]:
    """Writes down which module runs; copies of the model carry the hooks along."""
    running: list[str] = []
    steps = 0

    def write() -> None:
        nonlocal steps
        steps += 1
        text = (running[-1] if running else "").encode()[: _PLACE - 12]
        board[:12] = steps.to_bytes(8, "little") + len(text).to_bytes(4, "little")
        board[12 : 12 + len(text)] = text

    def enter(path: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            running.append(path)
            write()

        return hook

    def leave(*_: Any) -> None:
        if running:
            running.pop()
        write()

    handles = []
    for path, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(enter(path), prepend=True))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _read(reader: int, board: mmap.mmap, child: int) -> bytes:
    """All that the child writes; a child that hangs is ended."""
    parts: list[bytes] = []
    seen, since = b"", time.monotonic()
    while True:
        ready, _, _ = select.select([reader], [], [], 1.0)
        if ready:
            part = os.read(reader, 1 << 20)
            if not part:
                return b"".join(parts)
            parts.append(part)
        if ready or board[:8] != seen:
            seen, since = board[:8], time.monotonic()
        elif time.monotonic() - since > _SILENCE_S:
            os.kill(child, signal.SIGKILL)
            return b""


def _read_place(board: mmap.mmap) -> str:
    length = int.from_bytes(board[8:12], "little")
    return bytes(board[12 : 12 + length]).decode(errors="replace")


def _how(status: int) -> str:
    code = os.waitstatus_to_exitcode(status)
    if code == -signal.SIGKILL:
        return "hung, or took more memory than there is,"
    return f"ended the process ({signal.Signals(-code).name if code < 0 else f'exit code {code}'})"


def compiled_code(model: nn.Module) -> str | None:
    """Name of a compiled module of another library that the code of `model` can reach, if there is one."""
    waiting = list(dict.fromkeys(type(module).__module__ for module in model.modules()))
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        module = sys.modules.get(name)
        if name in seen or module is None or name.partition(".")[0] in _TRUSTED:
            continue
        seen.add(name)
        if _is_compiled(module) or name.partition(".")[0] in ("ctypes", "_ctypes"):
            return name
        for value in list(vars(module).values()):
            found = value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None)
            if isinstance(found, str):
                waiting.append(found)
    return None


def _is_compiled(module: types.ModuleType) -> bool:
    suffixes = tuple(importlib.machinery.EXTENSION_SUFFIXES)
    return str(getattr(module, "__file__", None) or "").endswith(suffixes)
