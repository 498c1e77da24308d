"""Bundles: opened with distrust, written with fixed bytes.

Nothing of a bundle is parsed before its hash has been checked, and `manifest.sha256` comes first: it vouches
for the manifest, and the manifest vouches for every other file. A hash proves that a bundle is the one that
was exported, not who exported it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import IO

from ..errors import BundleError, InputError
from ..process.scratch import Scratch
from .bundle_names import check_name, listing, require_distinct
from .consistency import check_consistency
from .golden import read_golden, require_plain
from .manifest import GOLDEN_FILE, MANIFEST_FILE, MANIFEST_HASH_FILE, MODEL_FILE, FileEntry, GoldenCase, Manifest
from .replacing import replaced
from .seal import Seal, seal_of

MANIFEST_LIMIT_BYTES = 64 << 20
_CHUNK = 1 << 20
_FIXED_DATE = (1980, 1, 1, 0, 0, 0)
_OWN_FILES = frozenset({MANIFEST_FILE, MANIFEST_HASH_FILE})
_ONNX_ALONE = (
    "an ONNX file and no bundle, which also has recorded answers to verify against, labels, preprocessing and hashes"
)
_ONNX_ADVICE = (
    "give the folder or the zip of the export that it comes from; one of another origin has nothing to be verified "
    "against, and edge_runtime.interleaved in Python times it on inputs of yours"
)


class Bundle:
    """A bundle whose every byte has been checked against its manifest. Use it as a context manager.

    Attributes:
        manifest: the parsed manifest.
        source: the folder or zip it was opened from.
        folder: where its files lie; a temporary folder when `source` is a zip.
        sha256: hash of manifest.json, which names the whole bundle.
    """

    def __init__(
        self,
        manifest: Manifest,
        source: Path,
        folder: Path,
        sha256: str,
        temporary: Scratch | None = None,
        seals: Mapping[str, Seal] | None = None,
    ) -> None:
        self.manifest = manifest
        self.source = source
        self.folder = folder
        self.sha256 = sha256
        self._temporary = temporary
        self._seals = dict(seals or {})

    def path(self, name: str) -> Path:
        """Where the file `name` of the manifest lies.

        Raises:
            BundleError: the manifest lists no such file.
        """
        if name not in self.manifest.files and name not in _OWN_FILES:
            listed = ", ".join(sorted(self.manifest.files))
            raise BundleError(f"{self.source} has no file {name!r}; it has {listed}")
        return self.folder / name

    def golden(self) -> list[GoldenCase]:
        """Reads the recorded cases, in order.

        Raises:
            BundleError: the file is not readable, or was altered since the bundle was opened.
        """
        with self.unchanged([GOLDEN_FILE]):
            return read_golden(self.path(GOLDEN_FILE))

    @contextlib.contextmanager
    def unchanged(self, names: Iterable[str]) -> Iterator[None]:
        """For a block that reads files of the bundle: what it has read is what the manifest's hashes vouch for.

        Args:
            names: the files, as in the manifest.

        Raises:
            BundleError: a file was altered or replaced since the bundle was opened, or while the block ran.
        """
        names = list(names)
        for name in names:
            now = self._seal(name)
            if name not in self._seals or self._seals[name].state != now.state:
                self._require_content(name)
                self._seals[name] = now
        yield
        for name in names:
            after = self._seal(name)
            if after.state != self._seals[name].state:
                raise self._changed(name)
            if self._seals[name].young:
                self._require_content(name)
                self._seals[name] = after

    def _seal(self, name: str) -> Seal:
        try:
            return seal_of(self.path(name))
        except OSError:
            raise self._changed(name) from None

    def _require_content(self, name: str) -> None:
        try:
            intact = file_sha256(self.path(name)) == self.manifest.files[name].sha256
        except OSError:
            intact = False
        if not intact:
            raise self._changed(name)

    def _changed(self, name: str) -> BundleError:
        return BundleError(f"{self.source}: {name!r} was altered since the bundle was opened; copy or export it again")

    def close(self) -> None:
        """Removes the temporary folder of a zip; nothing happens to a folder."""
        if self._temporary is not None:
            self._temporary.cleanup()
            self._temporary = None

    def __enter__(self) -> Bundle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_bundle(path: str | os.PathLike[str], follow_links: bool = False) -> Bundle:
    """Opens a bundle, a folder or a zip, after checking all of it.

    Args:
        path: the bundle. A zip is unpacked into a temporary folder, which `Bundle.close` removes.
        follow_links: take a folder of links, as stores of files make them, for the files that they lead to. These are
            copied into a temporary folder as well, so that what was checked is what runs.

    Raises:
        BundleError: anything missing, extra, altered, truncated, linked or named outside the folder; the text
            names the file.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return _open_folder(path, follow_links)
        if path.is_file():
            return _open_zip(path)
    except OSError as error:
        raise BundleError(f"cannot read the bundle {path}: {error}") from None
    raise BundleError(f"no bundle at {path}: give the folder or the zip that the export wrote")


def bundle_of(manifest_path: str | os.PathLike[str], sha256: str) -> Bundle:
    """A bundle that another process has opened: its files are checked when they are used, see `Bundle.unchanged`.

    Args:
        manifest_path: its manifest.json.
        sha256: of that file, as `Bundle.sha256` has it.

    Raises:
        BundleError: it is another manifest now.
    """
    folder = Path(manifest_path).parent
    try:
        manifest, found = _checked_manifest(_read_bounded(folder / MANIFEST_FILE), sha256.encode(), folder)
    except OSError as error:
        raise BundleError(f"cannot read the bundle {folder}: {error}") from None
    return Bundle(manifest, folder, folder, found)


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Hex sha256 of a file's content."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def write_manifest(folder: str | os.PathLike[str], manifest: Manifest) -> Manifest:
    """Closes a bundle: hashes what lies in `folder` and writes manifest.json and manifest.sha256.

    Args:
        folder: holds model.onnx, golden.npz and whatever else belongs to the bundle.
        manifest: everything but `files`, which is filled here.

    Returns:
        The manifest as written.

    Raises:
        BundleError: a symlink in the folder, model.onnx or golden.npz missing, or fields that contradict each other.
    """
    check_consistency(manifest)
    folder = Path(folder)
    names = sorted(listing(folder).names - _OWN_FILES)
    files = {name: FileEntry((folder / name).stat().st_size, file_sha256(folder / name)) for name in names}
    _require(files, folder)
    manifest = replace(manifest, files=files)
    text = manifest.to_json().encode()
    (folder / MANIFEST_FILE).write_bytes(text)
    (folder / MANIFEST_HASH_FILE).write_text(hashlib.sha256(text).hexdigest() + "\n", encoding="ascii")
    return manifest


def pack_zip(folder: str | os.PathLike[str], zip_path: str | os.PathLike[str]) -> None:
    """Packs a bundle folder into a zip with fixed bytes: sorted, stored without compression, fixed dates.

    Args:
        folder: a complete bundle; it is checked first.
        zip_path: file to write; replaced if it exists.

    Raises:
        BundleError: the folder is no intact bundle.
    """
    with (
        open_bundle(folder) as bundle,
        replaced(zip_path) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive,
        bundle.unchanged(bundle.manifest.files),
    ):
        for name in sorted(_OWN_FILES) + sorted(bundle.manifest.files):
            source = bundle.path(name)
            info = zipfile.ZipInfo(name, _FIXED_DATE)
            info.external_attr = 0o644 << 16
            info.file_size = source.stat().st_size  # tells zipfile whether the entry needs zip64
            with source.open("rb") as reader, archive.open(info, "w") as writer:
                shutil.copyfileobj(reader, writer, _CHUNK)


def _open_folder(folder: Path, follow_links: bool) -> Bundle:
    if not (folder / MANIFEST_FILE).is_file():  # before a walk through what may be somebody's whole disk
        _require_own([found.relative_to(folder).as_posix() for found in folder.glob(f"*/{MANIFEST_FILE}")], folder)
    found = listing(folder, follow_links)
    _require_own(found.names, folder)
    own = {name: _read_bounded(folder / name) for name in _OWN_FILES}
    manifest, sha256 = _checked_manifest(own[MANIFEST_FILE], own[MANIFEST_HASH_FILE], folder)
    _compare_names(found.names, manifest, folder)
    if found.linked:
        return _copied(manifest, sha256, own, folder, lambda name: (folder / name).open("rb"))
    seals = {}
    for name, entry in manifest.files.items():
        seals[name] = seal_of(folder / name)
        size = (folder / name).stat().st_size
        if size != entry.bytes:
            raise _altered(folder, name, f"has {size} bytes, the manifest says {entry.bytes}")
        if file_sha256(folder / name) != entry.sha256:
            raise _altered(folder, name, "differs from the manifest's sha256")
    return Bundle(manifest, folder, folder, sha256, seals=seals)


def _open_zip(path: Path) -> Bundle:
    try:
        with zipfile.ZipFile(path) as archive:
            return _unpack(archive, path)
    except (zipfile.BadZipFile, NotImplementedError, EOFError, zlib.error, UnicodeDecodeError) as error:
        advice = _part_of(path)
        if path.name.lower().endswith((".onnx", ".onnx.data")):
            raise BundleError(f"{path} is {_ONNX_ALONE}: {advice or _ONNX_ADVICE}") from None
        raise BundleError(
            f"{path} is neither a folder nor a readable zip ({error}): {advice or 'copy it again'}"
        ) from None


def _part_of(path: Path) -> str | None:
    """Advice for a file that lies in a bundle's folder, or in one of its folders; None if it does not."""
    for folder in path.absolute().parents[:2]:
        if (folder / MANIFEST_FILE).is_file():
            return f"it is a part of the bundle {folder}, give that folder"
    return None


def _unpack(archive: zipfile.ZipFile, path: Path) -> Bundle:
    entries = _zip_entries(archive, path)
    _require_own(entries, path)
    own = {name: _read_zip_bounded(archive, entries[name], path) for name in _OWN_FILES}
    manifest, sha256 = _checked_manifest(own[MANIFEST_FILE], own[MANIFEST_HASH_FILE], path)
    _compare_names(entries, manifest, path)
    return _copied(manifest, sha256, own, path, lambda name: archive.open(entries[name]))


def _copied(
    manifest: Manifest, sha256: str, own: Mapping[str, bytes], source: Path, open_file: Callable[[str], IO[bytes]]
) -> Bundle:
    """A bundle in a temporary folder, its files checked while they are copied.

    Args:
        manifest: checked.
        sha256: of the manifest.
        own: the manifest and its hash, as they were read.
        source: where the bundle comes from, for the messages.
        open_file: opens a file of the manifest for reading.
    """
    needed = sum(entry.bytes for entry in manifest.files.values())
    temporary = Scratch("edgewright-")
    folder, seals = temporary.path, {}
    try:
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise InputError(
                f"{source} takes {needed} bytes and {folder} has {free} free: set TMPDIR to a larger disk, or unpack "
                "it yourself into a folder of plain files and give that"
            )
        for name, data in own.items():
            (folder / name).write_bytes(data)
        for name, entry in manifest.files.items():
            with open_file(name) as reader:
                _copy(reader, name, entry, folder / name, source)
            seals[name] = seal_of(folder / name)
    except BaseException:
        temporary.cleanup()
        raise
    return Bundle(manifest, source, folder, sha256, temporary, seals)


def _copy(reader: IO[bytes], name: str, entry: FileEntry, target: Path, source: Path) -> None:
    """Copies one file, never writing more than the manifest allows."""
    target.parent.mkdir(parents=True, exist_ok=True)
    digest, written = hashlib.sha256(), 0
    with target.open("wb") as writer:
        while chunk := _next_chunk(reader, name, source):
            written += len(chunk)
            if written > entry.bytes:
                raise _altered(source, name, f"unpacks to more than the manifest's {entry.bytes} bytes")
            digest.update(chunk)
            writer.write(chunk)
    if written != entry.bytes:
        raise _altered(source, name, f"has {written} bytes, the manifest says {entry.bytes}")
    if digest.hexdigest() != entry.sha256:
        raise _altered(source, name, "differs from the manifest's sha256")


def _next_chunk(reader: IO[bytes], name: str, source: Path) -> bytes:
    try:
        return reader.read(_CHUNK)
    except (
        zipfile.BadZipFile,
        EOFError,
        zlib.error,
    ) as error:  # names the entry, unlike the archive-wide handler
        raise _altered(source, name, f"cannot be unpacked ({error})") from None


def _zip_entries(archive: zipfile.ZipFile, path: Path) -> dict[str, zipfile.ZipInfo]:
    entries: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        check_name(info.orig_filename.removesuffix("/"), path)
        try:
            require_plain(info, path)
        except InputError as error:
            raise BundleError(str(error)) from None
        if stat.S_ISLNK(info.external_attr >> 16):
            raise BundleError(f"{path} holds the symlink {info.filename!r}; a bundle holds plain files only")
        if info.is_dir():
            continue
        if info.filename in entries:
            raise BundleError(f"{path} holds {info.filename!r} twice: it was not written by an export")
        entries[info.filename] = info
    require_distinct(entries, path)
    return entries


def _require_own(names: Iterable[str], source: Path) -> None:
    names = set(names)
    for wanted in (MANIFEST_FILE, MANIFEST_HASH_FILE):
        if wanted in names:
            continue
        nested = [name for name in sorted(names) if name.endswith("/" + wanted)]
        hint = f"it lies in {nested[0]!r}, use that folder" if nested else "this is no bundle, or half of one"
        hint = (_part_of(source) if source.is_file() else None) or hint
        raise BundleError(f"{source} has no {wanted}: {hint}")


def _require(files: Mapping[str, FileEntry], source: Path) -> None:
    for wanted in (MODEL_FILE, GOLDEN_FILE):
        if wanted not in files:
            raise BundleError(f"{source} has no {wanted}: a bundle cannot go without it, export it again")


def _checked_manifest(text: bytes, hash_text: bytes, source: Path) -> tuple[Manifest, str]:
    actual = hashlib.sha256(text).hexdigest()
    if hash_text.decode("ascii", "replace").strip() != actual:
        raise _altered(source, MANIFEST_FILE, f"differs from {MANIFEST_HASH_FILE}")
    try:
        manifest = Manifest.from_json(text.decode())
        check_consistency(manifest)
    except UnicodeDecodeError:
        raise BundleError(f"{source}: {MANIFEST_FILE} is not UTF-8; export it again") from None
    except BundleError as error:
        raise BundleError(f"{source}: {error}") from None
    return manifest, actual


def _compare_names(names: Iterable[str], manifest: Manifest, source: Path) -> None:
    for name in manifest.files:
        check_name(name, source)
        if name in _OWN_FILES:
            raise BundleError(f"{source}: the manifest lists {name!r}, which cannot vouch for itself")
    present, listed = set(names) - _OWN_FILES, set(manifest.files)
    if missing := sorted(listed - present):
        raise BundleError(f"{source} lacks {', '.join(map(repr, missing))}: copy the bundle again, completely")
    if extra := sorted(present - listed):
        raise BundleError(
            f"{source} holds {', '.join(map(repr, extra))}, which the manifest does not list: a bundle is "
            "immutable, put other files beside it"
        )
    _require(manifest.files, source)


def _read_bounded(path: Path) -> bytes:
    with path.open("rb") as stream:
        return _bounded(stream.read(MANIFEST_LIMIT_BYTES + 1), path.name, path.parent)


def _read_zip_bounded(archive: zipfile.ZipFile, info: zipfile.ZipInfo, source: Path) -> bytes:
    with archive.open(info) as stream:
        return _bounded(stream.read(MANIFEST_LIMIT_BYTES + 1), info.filename, source)


def _bounded(data: bytes, name: str, source: Path) -> bytes:
    if len(data) > MANIFEST_LIMIT_BYTES:
        raise BundleError(f"{source}: {name} is larger than {MANIFEST_LIMIT_BYTES} bytes: this is no bundle")
    return data


def _altered(source: Path, name: str, what: str) -> BundleError:
    return BundleError(f"{source}: {name} {what}; the bundle was altered or truncated: copy or export it again")
