"""A bundle of two exits, made in seconds, and what an attacker would do to it."""

import hashlib
import json
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn

from edgewright.export import ExportOptions, export_bundle
from edgewright.models.layers.multi_exit import HeadSpec, MultiExit
from edgewright.pipeline.tasks.image_classification import ImageClassification

warnings.filterwarnings("ignore")
torch.set_num_threads(1)


def make(folder, width=8, **options):
    """Writes the bundle and beside it ``x.npy``, a row that it takes."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(80, 1, 6, 6, generator=generator), torch.arange(80) % 4
    task = ImageClassification.from_arrays(images + labels[:, None, None, None], labels, list("abcd"))
    base = nn.Sequential(
        nn.Flatten(), nn.Linear(36, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4)
    )
    model = MultiExit(base, [HeadSpec("2", width)], [2], 4, "max_probability").eval()
    model.thresholds.fill_(0.4)
    export_bundle(model, task, folder, ExportOptions(simplify="none", **options))
    np.save(Path(folder).parent / "x.npy", images[:1].numpy())
    return Path(folder)


def reseal(folder, change):
    """Changes the manifest, and makes its hash fit again."""
    data = json.loads((folder / "manifest.json").read_text())
    text = change(json.dumps(data)) if change.__code__.co_varnames[0] == "text" else None
    if text is None:
        change(data)
        text = json.dumps(data)
    (folder / "manifest.json").write_text(text)
    (folder / "manifest.sha256").write_text(hashlib.sha256(text.encode()).hexdigest())
