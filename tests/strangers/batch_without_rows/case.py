"""Levels that cannot run without rows: a batch of none has an answer all the same, in both layouts."""

import tempfile
import warnings

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from edgewright.edge_runtime import load
from edgewright.export import ExportOptions, export_bundle
from edgewright.models.layers.multi_exit import HeadSpec, MultiExit
from edgewright.pipeline import ImageClassification

warnings.simplefilter("ignore")


class Apply(nn.Module):
    def __init__(self, function, layer=None):
        super().__init__()
        self.function, self.layer = function, layer

    def forward(self, x):
        return self.function(x, self.layer)


def recurrent(x, layer):
    y, _ = layer(x.flatten(2).transpose(1, 2))
    return y.transpose(1, 2).reshape(x.shape)


KINDS = {
    "group_norm": lambda: nn.GroupNorm(2, 4),
    "circular": lambda: nn.Conv2d(4, 4, 3, 1, 1, padding_mode="circular"),
    "unfold": lambda: Apply(lambda x, _: F.fold(F.unfold(x, 3, padding=1), (6, 6), 3, padding=1)),
    "einsum": lambda: Apply(lambda x, _: torch.einsum("nchw,ndhw->ncd", x, x)[..., None]),
    "lstm": lambda: Apply(recurrent, nn.LSTM(4, 4, batch_first=True)),
    "view": lambda: Apply(lambda x, _: x.view(-1, 6, 6).cumsum(-1).view(-1, 4, 6, 6)),
}
y = torch.arange(30) % 3
x = torch.randn(30, 3, 6, 6, generator=torch.Generator().manual_seed(0)) + y[:, None, None, None] / 2
task = ImageClassification.from_arrays(x, y, ["a", "b", "c"])
for name, kind in KINDS.items():
    try:
        torch.manual_seed(0)
        first = nn.Sequential(nn.Conv2d(3, 4, 3, 1, 1), kind()).eval()
        base = nn.Sequential(first, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))
        model = MultiExit(base, [HeadSpec("0", 4)], [4], 3, "max_probability")
        model.thresholds.fill_(0.4)
        seen = []
        with tempfile.TemporaryDirectory() as place:
            export_bundle(model, task, f"{place}/b", ExportOptions(batch="compact", split=True), parity_rows=6)
            for layout in ("file", "split"):
                with load(f"{place}/b", threads=1, layout=layout) as runner:
                    got = runner.run({"image": np.zeros((0, 3, 6, 6), np.float32)})
                    seen.append([got[output].shape for output in ("label", "scores", "exit_index")])
        right = seen == [[(0,), (0, 3), (0,)]] * 2
        print(f"{'right' if right else 'wrong'} {name}: {seen}")
    except Exception as error:
        print(f"wrong {name}: {type(error).__name__}: {str(error)[:150]!r}")
