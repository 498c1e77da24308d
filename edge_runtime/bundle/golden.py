"""golden.npz: the runs that were recorded at export, written with fixed bytes and read without trust.

``numpy.load`` is not used for reading: it allocates what an array's header asks for before it has seen the
bytes. Here a header that disagrees with the size of its entry is refused first, and nothing is unpickled.
"""

from __future__ import annotations

import io
import math
import os
import re
import tokenize
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import BundleError, InputError
from .manifest import GoldenCase
from .replacing import replaced

GOLDEN_LIMIT_BYTES = 1 << 30
"""Most uncompressed bytes of all arrays of one .npz."""

_HEADER_ERRORS = (ValueError, TypeError, SyntaxError, tokenize.TokenError, RecursionError, MemoryError)
"""What numpy's reader of headers raises for headers that are none."""

_FIXED_DATE = (1980, 1, 1, 0, 0, 0)
_KEY = re.compile(r"(?P<index>\d{4,})/(?:(?P<group>input|torch|reference)/(?P<name>.+)|(?P<single>thresholds|margin))")


def write_npz(path: str | os.PathLike[str], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Writes an uncompressed .npz whose bytes depend on nothing but `arrays`: sorted keys, fixed dates.

    Args:
        path: file to write; replaced if it exists.
        arrays: name -> array of any shape with a plain dtype.

    Raises:
        InputError: an array holds Python objects.
    """
    with replaced(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        for key in sorted(arrays):
            value = np.asarray(arrays[key], order="C")
            if value.dtype.hasobject:
                raise InputError(f"{key!r} holds Python objects and cannot be stored: convert it to numbers")
            stream = io.BytesIO()
            np.lib.format.write_array(stream, value, version=(1, 0), allow_pickle=False)
            info = zipfile.ZipInfo(key + ".npy", _FIXED_DATE)
            info.external_attr = 0o644 << 16
            archive.writestr(info, stream.getvalue())


def read_npz(path: str | os.PathLike[str], limit_bytes: int = GOLDEN_LIMIT_BYTES) -> dict[str, NDArray[Any]]:
    """Reads every array of an .npz, bounded in memory and without pickle.

    Args:
        path: the .npz file.
        limit_bytes: most uncompressed bytes that are accepted in all.

    Raises:
        InputError: not an .npz, damaged, larger than `limit_bytes`, or holding Python objects.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            total = sum(entry.file_size for entry in entries)
            if total > limit_bytes:
                raise InputError(f"{path.name} unpacks to {total} bytes, more than the {limit_bytes} that are accepted")
            for entry in entries:
                require_plain(entry, path)
            arrays = {entry.filename.removesuffix(".npy"): _read_entry(archive, entry, path) for entry in entries}
            if len(arrays) != len(entries):
                raise InputError(f"{path.name} holds one array twice: it was not written by numpy or an export")
            return arrays
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not a readable .npz ({error})") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error}") from None


def require_plain(entry: zipfile.ZipInfo, source: Path) -> None:
    """Refuses a zip entry that is encrypted or packed in another way than numpy and our export pack.

    The other ways (bzip2, LZMA) raise errors of their own and take memory as the entry says.

    Raises:
        InputError: names the entry.
    """
    if entry.flag_bits & 1:
        raise InputError(f"{source} holds the encrypted entry {entry.filename!r}: pack it without a password")
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise InputError(f"{source} packs {entry.filename!r} neither stored nor deflated: pack it again")


def _read_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path) -> NDArray[Any]:
    where = f"{path.name}:{entry.filename}"
    with archive.open(entry) as stream:
        try:
            version = np.lib.format.read_magic(stream)
            if version == (1, 0):
                shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
            elif version == (2, 0):
                shape, fortran, dtype = np.lib.format.read_array_header_2_0(stream)
            else:
                raise ValueError(f"version {version} of the .npy format is not supported")
        except _HEADER_ERRORS as error:
            raise InputError(f"{where} is not an array ({error})") from None
        if dtype.hasobject:
            raise InputError(f"{where} holds pickled Python objects, which are never read")
        wanted = entry.file_size - stream.tell()
        if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != wanted:
            raise InputError(f"{where} says {dtype} {shape} and holds {wanted} bytes")
        data = stream.read(wanted + 1)
    if len(data) != wanted:
        raise InputError(f"{where} is truncated: {len(data)} of {wanted} bytes")
    try:
        return np.frombuffer(data, dtype=dtype).reshape(shape, order="F" if fortran else "C")
    except (ValueError, TypeError) as error:  # a dtype without bytes, more axes than numpy has
        raise InputError(f"{where} cannot be {dtype} {shape} ({error})") from None


def write_golden(path: str | os.PathLike[str], cases: Sequence[GoldenCase]) -> None:
    """Writes golden.npz: equal cases give equal bytes.

    Args:
        path: file to write.
        cases: at least one case; keys as `GoldenCase` describes.

    Raises:
        InputError: no case, or a case without inputs or without any expected output.
    """
    if not cases:
        raise InputError("golden.npz needs at least one case")
    arrays: dict[str, NDArray[Any]] = {}
    for index, case in enumerate(cases):
        if not case.inputs or not (case.torch or case.reference):
            raise InputError(f"golden case {index} needs inputs and expected outputs")
        for group, values in (("input", case.inputs), ("torch", case.torch), ("reference", case.reference)):
            for name, value in values.items():
                arrays[f"{index:04d}/{group}/{name}"] = np.asarray(value)
        if case.thresholds is not None:
            arrays[f"{index:04d}/thresholds"] = np.asarray(case.thresholds, np.float32)
        if case.margin is not None:
            arrays[f"{index:04d}/margin"] = np.asarray(case.margin, np.float32)
    write_npz(path, arrays)


def read_golden(path: str | os.PathLike[str]) -> list[GoldenCase]:
    """Reads golden.npz.

    Returns:
        The cases in the order they were written.

    Raises:
        BundleError: not readable by `read_npz`, a key that is none of `GoldenCase`'s, or a gap in the
            numbering.
    """
    path = Path(path)
    cases: dict[int, dict[str, Any]] = {}
    try:
        arrays = read_npz(path)
    except InputError as error:
        raise BundleError(f"{error}: export the bundle again") from None
    for key, value in arrays.items():
        match = _KEY.fullmatch(key)
        if match is None or match["index"] != f"{int(match['index']):04d}":
            raise BundleError(f"{path.name} holds {key!r}, which is no part of a golden case: export it again")
        case = cases.setdefault(int(match["index"]), {"input": {}, "torch": {}, "reference": {}})
        if match["single"]:
            case[match["single"]] = value
        else:
            case[match["group"]][match["name"]] = value
    if sorted(cases) != list(range(len(cases))) or not cases:
        raise BundleError(f"{path.name} numbers its cases {sorted(cases)}: export it again")
    return [
        GoldenCase(
            inputs=case["input"],
            torch=case["torch"],
            reference=case["reference"],
            thresholds=case.get("thresholds"),
            margin=case.get("margin"),
        )
        for _, case in sorted(cases.items())
    ]
