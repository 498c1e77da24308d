"""Setting the thresholds inside an ONNX file's bytes, and seeing whether it branches, with the standard library alone.

``SessionOptions.add_initializer`` looks like the door for this and is a trap: ONNX Runtime 1.31 puts the
value in only after the graph was optimized. If an operator reads the thresholds together with constants
only, say a Gather that picks one of them, constant folding has taken the file's value before, and the new one
is ignored without a word; the same holds where the thresholds are planned on another device. A name or a
shape that does not exist is accepted as well. So it is taken only on the CPU, and only for an initializer that
is an input of the graph too, as the export makes it: that one is folded nowhere, by ONNX's own rule. In any other
case the few bytes of the tensor are replaced before ONNX Runtime sees the model, at the price of two more copies
of the weights in memory while the session is made.

The format is protobuf: every field is a varint key ``number << 3 | wire type`` and a value.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import InputError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MODEL_GRAPH, _GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_INPUT = 7, 1, 5, 11
_OPERATOR_IF = bytes([4 << 3 | _BYTES, 2]) + b"If"
"""The field `op_type` of a node, whole: looked for as it is, because a session's start waits for the answer."""
_DIMS, _DATA_TYPE, _FLOAT_DATA, _NAME, _RAW_DATA, _DATA_LOCATION = 1, 2, 4, 8, 9, 14
_FLOAT = 1
_INPUT_NAME = 1

Field = tuple[int, int, int, int, int]
"""number, wire type, first and last byte of the value (half open), and the value of a varint."""


def with_vector(path: str | os.PathLike[str], name: str, values: Sequence[float]) -> bytes:
    """A model's bytes with one float32 vector among the main graph's initializers replaced.

    Args:
        path: the ONNX file; it is not changed.
        name: of the initializer.
        values: as many as it has.

    Raises:
        InputError: no such initializer, not a float32 vector of this length, or no ONNX file.
    """
    with _mapped(path, mmap.ACCESS_COPY) as data:  # pages that are not written to are not copied
        packed = struct.pack(f"<{len(values)}f", *values)
        for start, end in _places(data, name, values, Path(path)):
            data[start:end], packed = packed[: end - start], packed[end - start :]
        return bytes(data)


def check_vector(path: str | os.PathLike[str], name: str, values: Sequence[float]) -> bool:
    """Whether a float32 vector among the main graph's initializers is also an input of the graph.

    Args:
        path: the ONNX file; its weights are not read.
        name: of the initializer.
        values: as many as it has.

    Raises:
        InputError: as `with_vector`.
    """
    with _mapped(path, mmap.ACCESS_READ) as data:
        _places(data, name, values, Path(path))
        return any(True for _ in _named(data, _GRAPH_INPUT, _INPUT_NAME, name.encode()))


@contextlib.contextmanager
def _mapped(path: str | os.PathLike[str], access: int) -> Iterator[mmap.mmap]:
    try:
        with Path(path).open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=access) as data:
            yield data
    except (IndexError, ValueError, struct.error):  # an empty file cannot be mapped
        raise InputError(f"{path} is damaged or no ONNX file") from None


def has_branches(path: str | os.PathLike[str]) -> bool:
    """Whether a model has an `If`, in its main graph or below; reads no weights. False for what is no ONNX file."""
    try:
        with Path(path).open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            for number, wire, start, end, _ in _fields(data, 0, len(data)):
                if (number, wire) != (_MODEL_GRAPH, _BYTES):
                    continue
                for inner, inner_wire, first, last, _ in _fields(data, start, end):
                    if (inner, inner_wire) == (_GRAPH_NODE, _BYTES) and data.find(_OPERATOR_IF, first, last) >= 0:
                        return True
    except (IndexError, ValueError, OSError):  # an empty file cannot be mapped; ONNX Runtime says what is wrong
        return False
    return False


def _named(data: mmap.mmap, kind: int, name_field: int, name: bytes) -> Iterator[list[Field]]:
    """The fields of every message of this kind in the main graph that has this name."""
    for number, wire, start, end, _ in _fields(data, 0, len(data)):
        if (number, wire) != (_MODEL_GRAPH, _BYTES):
            continue
        for inner, inner_wire, first, last, _ in _fields(data, start, end):
            if (inner, inner_wire) != (kind, _BYTES):
                continue
            fields = list(_fields(data, first, last))
            if any(field[0] == name_field and data[field[2] : field[3]] == name for field in fields):
                yield fields


def _places(data: mmap.mmap, name: str, values: Sequence[float], path: Path) -> list[tuple[int, int]]:
    """Where the bytes of the vector lie; several places only for numbers that are not packed.

    Raises:
        InputError: there is no such vector, or it cannot take these values.
    """
    what = f"{path}: {name!r}"
    tensor = next(_named(data, _GRAPH_INITIALIZER, _NAME, name.encode()), None)
    if tensor is None:
        raise InputError(f"{path} has no initializer {name!r} in its main graph, so it cannot be set")
    single = {number: value for number, wire, _, _, value in tensor if wire == _VARINT}
    shape = _dims(data, tensor)
    if single.get(_DATA_TYPE) != _FLOAT or len(shape) != 1:
        raise InputError(f"{what} is no float32 vector (shape {shape}), so it cannot be set")
    if shape[0] != len(values):
        raise InputError(f"{what} has {shape[0]} values, got {len(values)}: {list(values)}")
    if single.get(_DATA_LOCATION, 0) != 0:
        raise InputError(f"{what} lies in an external file, so it cannot be set: export it inside the model")
    places = [(start, end) for number, _, start, end, _ in tensor if number in (_RAW_DATA, _FLOAT_DATA)]
    if sum(end - start for start, end in places) != 4 * len(values):
        raise InputError(f"{what} does not hold the values that its shape promises: export it again")
    return places


def _dims(data: mmap.mmap, tensor: list[Field]) -> list[int]:
    shape: list[int] = []
    for number, wire, start, end, value in tensor:
        if number == _DIMS and wire == _VARINT:
            shape.append(value)
        elif number == _DIMS:  # packed
            while start < end:
                size, start = _varint(data, start)
                shape.append(size)
    return shape


def _fields(data: mmap.mmap, position: int, end: int) -> Iterator[Field]:
    while position < end:
        key, position = _varint(data, position)
        number, wire, value = key >> 3, key & 7, 0
        start = position
        if wire == _VARINT:
            value, position = _varint(data, position)
        elif wire == _BYTES:
            length, start = _varint(data, position)
            position = start + length
        elif wire in (_FIXED32, _FIXED64):
            position += 4 if wire == _FIXED32 else 8
        else:
            raise IndexError(f"wire type {wire}")
        if position > end:
            raise IndexError("a field reaches beyond its message")
        yield number, wire, start, position, value


def _varint(data: mmap.mmap, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise IndexError("varint too long")
