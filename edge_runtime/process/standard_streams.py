"""Standard output and standard error of a command line, whose loss ends nothing in the middle.

A reader that has seen enough (``| head``) is no error: what comes further is dropped, and the command's own exit code
stands. A full disk is one, which the command line reports when the work is done. Streams that were closed before the
start go nowhere, and their numbers are taken: the next file that is opened must not become standard output.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import select
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from .plain_text import printable_lines


class _Descriptor(io.RawIOBase):
    """Writes to a file descriptor; after a failure the rest is dropped."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.failure: OSError | None = None

    def fileno(self) -> int:
        return self._descriptor

    def isatty(self) -> bool:
        return os.isatty(self._descriptor)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data)
        if self.failure is None:
            try:
                return os.write(self._descriptor, view)
            except BlockingIOError:  # some parents hand down a pipe that does not wait
                select.select([], [self._descriptor], [])
                return 0
            except OSError as error:
                self.failure = error
        return view.nbytes


class StandardStream(io.TextIOWrapper):
    """A text stream over a descriptor.

    Attributes:
        escaping: whether what steers a terminal is written in Python's notation; for texts that come from a bundle.
    """

    def __init__(self, descriptor: int, encoding: str, line_buffering: bool) -> None:
        self._raw = _Descriptor(descriptor)
        buffer = io.BufferedWriter(self._raw)
        super().__init__(buffer, encoding=encoding, errors="backslashreplace", line_buffering=line_buffering)
        self.escaping = False

    @property
    def lost(self) -> OSError | None:
        """Why something did not arrive; None if nobody wanted to read it, or all is well."""
        failure = self._raw.failure
        return None if failure is None or failure.errno in (errno.EPIPE, errno.ECONNRESET) else failure

    def write(self, text: str) -> int:
        """As any text stream's."""
        super().write(printable_lines(text) if self.escaping else text)
        return len(text)


@contextlib.contextmanager
def standard_streams(escaping: bool = False) -> Iterator[None]:
    """Puts such streams in the place of ``sys.stdout`` and ``sys.stderr``; streams that a caller has replaced stay.

    Args:
        escaping: see `StandardStream`; also sets it, for as long, on streams that are already of this kind.
    """
    before = sys.stdout, sys.stderr
    _occupy_closed_descriptors()
    sys.stdout, sys.stderr = (_own(*given) for given in ((before[0], 1), (before[1], 2)))
    ours = [stream for stream in (sys.stdout, sys.stderr) if isinstance(stream, StandardStream)]
    escaped = [stream.escaping for stream in ours]
    for stream in ours:
        stream.escaping |= escaping
    try:
        yield
    finally:
        for stream, was in zip(ours, escaped, strict=True):
            stream.flush()
            stream.escaping = was
        # the stream of a caller that a command has put aside in between is the caller's business
        sys.stdout, sys.stderr = before


def lost_output() -> str | None:
    """Why standard output is incomplete, in the system's words; None if it is not, or if nobody wanted to read it."""
    if not isinstance(sys.stdout, StandardStream):
        return None
    sys.stdout.flush()
    lost = sys.stdout.lost
    return None if lost is None else lost.strerror or str(lost)


def _own(stream: TextIO | None, descriptor: int) -> TextIO:
    if stream is None:  # closed before Python started
        return StandardStream(descriptor, "utf-8", False)
    if not isinstance(stream, io.TextIOWrapper) or isinstance(stream, StandardStream):
        return stream
    try:
        if stream.fileno() != descriptor:
            return stream
        stream.flush()
    except (OSError, ValueError):  # without a descriptor; or closed meanwhile
        return stream
    return StandardStream(descriptor, stream.encoding, stream.line_buffering)


def _occupy_closed_descriptors() -> None:
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
