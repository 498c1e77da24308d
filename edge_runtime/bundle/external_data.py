"""Holds what an ONNX file keeps in other files to the files that the bundle's manifest vouches for.

ONNX Runtime follows an external location by itself, before anything can look at it: 1.19 reads ``../../file``. So the
protobuf is read here first, with the standard library alone: tensors of the graph, of every branch and loop body, of
attributes, sparse ones, and those of functions.
"""

from __future__ import annotations

import mmap
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import TypeAlias

from ..errors import BundleError
from ..inference.onnx_file import Field, fields_of
from ..process.scratch import Scratch

_LOCATION = b"location"
_CHUNK = 1 << 20
_BYTES = 2

_MESSAGES: Mapping[str, Mapping[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
"""Message -> its fields that may hold a tensor, and what they are."""
_TENSOR_NAME, _TENSOR_EXTERNAL = 8, 13
_KEY, _VALUE = 1, 2

Data: TypeAlias = mmap.mmap


def require_listed(path: Path, name: str, listed: Mapping[str, int], source: Path) -> None:
    """Refuses a model that reads what the manifest does not list.

    Args:
        path: the model's file.
        name: its name in the bundle; locations are relative to its folder.
        listed: name of every file of the bundle -> its bytes.
        source: the bundle, for the message.

    Raises:
        BundleError: a location that is none of the files, or a range beyond one; names the tensor. A file that speaks
            of locations and cannot be read.
    """
    if not keeps_weights_elsewhere(path):
        return
    try:
        with path.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            for tensor, entries in _external_tensors(data):
                if reason := _unfit(entries, PurePosixPath(name).parent, listed):
                    raise BundleError(
                        f"{source}: the tensor {tensor!r} in {name} {reason}; a bundle reads nothing but its own "
                        "files: do not use this bundle"
                    )
    except (IndexError, UnicodeDecodeError):
        raise BundleError(f"{source}: {name} is damaged or no ONNX file: copy or export it again") from None


def beside_its_weights(data: bytes, path: Path) -> Scratch:
    """A folder with a model under its own name, and links to the files beside which it lay.

    Args:
        data: of the model, changed.
        path: where it is from.
    """
    place = Scratch("edgewright-model-")
    for file in path.parent.iterdir():
        if file.is_file() and file.name != path.name:
            try:
                (place.path / file.name).symlink_to(file.resolve())
            except OSError:  # Windows lets only some users make links
                shutil.copyfile(file, place.path / file.name)
    (place.path / path.name).write_bytes(data)
    return place


def keeps_weights_elsewhere(path: Path) -> bool:
    """Whether a model may have external tensors: no file has them that does not hold the word ``location``."""
    tail = b""
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            if _LOCATION in tail + chunk[: len(_LOCATION)] or _LOCATION in chunk:
                return True
            tail = (tail + chunk)[-len(_LOCATION) :]
    return False


def _external_tensors(data: Data) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Every tensor with entries of external data, by name, whatever else it says about where its values are."""
    pending = [("model", 0, len(data))]
    while pending:
        message, start, end = pending.pop()
        fields = list(_messages(data, start, end))
        if message != "tensor":
            children = _MESSAGES[message]
            pending += [(children[number], first, last) for number, _, first, last, _ in fields if number in children]
            continue
        entries = [_entry(data, first, last) for number, _, first, last, _ in fields if number == _TENSOR_EXTERNAL]
        if entries:
            names = [data[first:last].decode() for number, _, first, last, _ in fields if number == _TENSOR_NAME]
            yield (names[-1] if names else ""), entries


def _messages(data: Data, start: int, end: int) -> Iterator[Field]:
    return (field for field in fields_of(data, start, end) if field[1] == _BYTES)


def _entry(data: Data, start: int, end: int) -> tuple[str, str]:
    """Key and value.

    Raises:
        IndexError: either is there twice, which readers may understand differently.
    """
    found = {_KEY: "", _VALUE: ""}
    seen: set[int] = set()
    for number, _, first, last, _ in _messages(data, start, end):
        if number in seen:
            raise IndexError("a key twice")
        seen.add(number)
        if number in found:
            found[number] = data[first:last].decode()
    return found[_KEY], found[_VALUE]


def _unfit(entries: list[tuple[str, str]], folder: PurePosixPath, listed: Mapping[str, int]) -> str | None:
    """Why these entries of a tensor are not to be followed; None if they are."""
    keys = [key for key, _ in entries]
    given = dict(entries)
    if len(given) < len(keys) or "location" not in given:
        return "does not say clearly where its values lie"
    location = given["location"]
    # no `..`, no second spelling: the name as the manifest has it
    name = (folder / location).as_posix()
    if name not in listed or location != PurePosixPath(location).as_posix():
        return f"lies in {location!r}, which is none of the files that the manifest lists"
    ranges = [given.get(key, "0") for key in ("offset", "length")]
    if not all(text.isascii() and text.isdigit() and len(text) < 20 for text in ranges):
        return f"lies at offset {ranges[0]!r} with length {ranges[1]!r} of {location!r}"
    if sum(map(int, ranges)) > listed[name]:
        return f"ends beyond {location!r}, which has {listed[name]} bytes"
    return None
