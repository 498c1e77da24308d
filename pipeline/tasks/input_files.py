"""Files as the inputs of a task: read when they are needed, by the code that reads them on the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgewright.edge_runtime.bundle.manifest import Preprocessing
from edgewright.edge_runtime.errors import InputError

from ..errors import DataError, EditedSourceError
from ..sources import content_digest
from ..stage import Progress
from ..task import Batch

_READ_AT_ONCE = 64


class FileReader:
    """Reads files with a few threads; a subclass says what one becomes.

    Args:
        preprocessing: for the manifest.
        workers: threads, at least one is used.
        memory_mb: of the inputs of a split that are kept.
    """

    def __init__(self, preprocessing: Preprocessing, workers: int = 4, memory_mb: int = 512) -> None:
        self.preprocessing = preprocessing
        self.memory_bytes = memory_mb * 2**20
        self.workers = max(1, workers)
        self._digests: dict[Path, bytes] = {}

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one input."""
        raise NotImplementedError

    def read(self, file: Path) -> NDArray[np.float32]:
        """One input, as on the device.

        Raises:
            InputError: it cannot be read.
        """
        raise NotImplementedError

    def inputs(self, files: Sequence[Path]) -> list[NDArray[np.float32]]:
        """Inputs float32 of `shape`, in order.

        Raises:
            DataError: names a file that cannot be read.
        """
        with ThreadPoolExecutor(min(self.workers, max(1, len(files)))) as pool:
            return list(pool.map(self._input, files))

    def digests(self, files: Sequence[Path]) -> list[bytes]:
        """Hashes of the files' bytes, in order."""
        new = [file for file in files if file not in self._digests]
        with ThreadPoolExecutor(self.workers) as pool:
            self._digests.update(zip(new, pool.map(_file_digest, new), strict=True))
        return [self._digests[file] for file in files]

    def _input(self, file: Path) -> NDArray[np.float32]:
        try:
            found = self.read(file)
        except InputError as error:
            raise DataError(str(error)) from error
        self.check_same(file)
        return found

    def check_same(self, file: Path) -> None:
        """Refuses a file that was edited after its digest was taken.

        Raises:
            EditedSourceError: names it.
        """
        if self._digests.get(file, digest := _file_digest(file)) != digest:
            raise EditedSourceError(
                f"{file} is not the file any more that it was when the task was made: a run needs data that stay as "
                "they are; run again to begin with the file as it is now"
            )


class FileSplit:
    """A split whose inputs lie in a file each; see `edgewright.pipeline.task.Split`.

    Args:
        files: one for each sample.
        targets: of any shape and dtype, [len, ...].
        reader: makes inputs of them.
    """

    def __init__(self, files: Sequence[Path], targets: Tensor, reader: FileReader) -> None:
        self._files, self._targets, self._reader = list(files), targets, reader
        fits = 4 * len(files) * int(np.prod(reader.shape)) <= reader.memory_bytes
        self._kept: dict[int, NDArray[np.float32]] | None = {} if fits else None

    @property
    def targets(self) -> Tensor:
        """Of every sample, [len, ...]."""
        return self._targets

    @property
    def sample_digests(self) -> Sequence[bytes]:
        """A hash of every file's bytes; reads all files once."""
        return self._reader.digests(self._files)

    @property
    def files(self) -> Sequence[Path]:
        """Where every sample comes from."""
        return self._files

    @property
    def file_digests(self) -> Mapping[Path, str]:
        """See `edgewright.pipeline.task.FromFiles`."""
        return {file: digest.hex() for file, digest in zip(self._files, self.sample_digests, strict=True)}

    def __len__(self) -> int:
        return len(self._files)

    def read_all(self, progress: Progress, description: str) -> None:
        """Decodes every file once, and keeps the inputs where they fit into memory.

        Args:
            progress: shown how far it has come.
            description: what it shows.

        Raises:
            DataError: names a file that cannot be read.
        """
        starts = range(0, len(self), _READ_AT_ONCE)
        for start in progress.track(starts, description, len(starts)):
            self.batch(range(start, min(len(self), start + _READ_AT_ONCE)))

    def batch(self, indices: Sequence[int] | Tensor) -> Batch:
        """The samples at `indices`, float32 [N, ...].

        Raises:
            DataError: names a file that cannot be read.
        """
        rows = [int(i) for i in torch.as_tensor(indices, dtype=torch.int64).tolist()]
        kept = {} if self._kept is None else self._kept
        found = {row: kept[row] for row in rows if row in kept}
        needed = list(dict.fromkeys(row for row in rows if row not in found))
        read = dict(zip(needed, self._reader.inputs([self._files[row] for row in needed]), strict=True))
        found.update(read)
        if self._kept is not None:
            self._kept.update(read)
        inputs = np.stack([found[row] for row in rows]) if rows else np.zeros((0, *self._reader.shape), np.float32)
        return Batch((torch.from_numpy(inputs),), self._targets[torch.tensor(rows, dtype=torch.int64)])


def _file_digest(file: Path) -> bytes:
    try:
        return bytes.fromhex(content_digest(file))
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error}); repair it or remove it") from error
