"""Writing the split layout into a bundle, and proving that it answers as everything else does."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edgewright.edge_runtime.bundle.bundle import open_bundle
from edgewright.edge_runtime.bundle.manifest import SPLIT_FOLDER, SplitSpec
from edgewright.edge_runtime.errors import ParityError
from edgewright.edge_runtime.inference.options import OPTIMIZATION_LEVELS
from edgewright.edge_runtime.inference.session import load
from edgewright.edge_runtime.proof.verification import verify

from ..accounts.ledger import stored_bytes, unique_bytes
from ..graph.model_file import check_file, save_model
from .split_levels import SplitLevels


def write_split(levels: SplitLevels, folder: Path, external_above: int | None) -> tuple[SplitSpec, str]:
    """Writes every level to a file below ``split/``.

    Args:
        levels: from `split_levels`.
        folder: of the bundle.
        external_above: see `save_model`.

    Returns:
        What the manifest says about them, and a note on the bytes.

    Raises:
        ExportError: a file is no valid ONNX.
    """
    (folder / SPLIT_FOLDER).mkdir()
    names = []
    for k, model in enumerate(levels.models):
        names.append(f"{SPLIT_FOLDER}/level{k}.onnx")
        save_model(model, folder / names[-1], external_above)
        check_file(folder / names[-1])
    stored, unique = sum(map(stored_bytes, levels.models)), unique_bytes(*levels.models)
    shared = (
        f", {stored - unique} of them twice or more often, for levels that read the same" if stored > unique else ""
    )
    note = f"the split layout stores {stored} weight bytes of its own{shared}"
    return SplitSpec(tuple(names), dict(levels.row_axes), unique, stored), note


def prove_split(folder: Path) -> None:
    """Holds the split layout to what PyTorch and ``model.onnx`` answered, every exit and optimization level.

    Args:
        folder: a complete bundle.

    Raises:
        ParityError: it answers differently; lists how.
    """
    with open_bundle(folder) as bundle:
        for level in OPTIMIZATION_LEVELS:
            report = verify(bundle, threads=1, optimization_level=level, layout="split")
            if not report.passed:
                raise ParityError(f"the split layout disagrees, no bundle was written:\n{report.text()}")
        if bundle.manifest.batch != "compact":
            return
        inputs = bundle.golden()[0].inputs
        with load(bundle, threads=1, layout="split") as runner:
            nothing = runner.run({name: np.asarray(value)[:0] for name, value in inputs.items()})
        for name, value in nothing.items():
            if value.shape[0] != 0:
                raise ParityError(f"the split layout answers a batch without rows with {name} of {list(value.shape)}")
