"""Networks of video, sound and medicine: convolutions of every rank without bias, in front of an exit and behind it."""

import tempfile
import warnings

import torch
from torch import nn

from edgewright.edge_runtime import verify
from edgewright.export import ExportOptions, export_bundle
from edgewright.models.layers.multi_exit import HeadSpec, MultiExit
from edgewright.pipeline import ImageClassification

warnings.simplefilter("ignore")
CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
KINDS = {
    "conv3d": (3, lambda: [nn.Conv3d(1, 8, 3, 2, 1, bias=False), nn.BatchNorm3d(8)]),
    "conv3d_grouped_and_same": (
        3,
        lambda: [
            nn.Conv3d(1, 8, 3, padding="same", bias=False),
            nn.Conv3d(8, 8, 3, padding=1, groups=4, bias=False),
            nn.Conv3d(8, 8, 3, padding=1, padding_mode="replicate", bias=False),
        ],
    ),
    "conv1d_dilated": (1, lambda: [nn.Conv1d(1, 8, 3, dilation=2, bias=False)]),
    "transposed3d": (3, lambda: [nn.Conv3d(1, 8, 1), nn.ConvTranspose3d(8, 8, 2, 2, bias=False)]),
}


class Mean(nn.Module):
    def forward(self, x):
        return x.flatten(2).mean(2)


class Net(nn.Module):
    def __init__(self, rank, layers):
        super().__init__()
        self.first, self.pooled = nn.Sequential(*layers), Mean()
        self.second = CONV[rank - 1](8, 8, 3, 2, 1, bias=False)
        self.last, self.top = Mean(), nn.Linear(8, 3)

    def forward(self, x):
        x = self.first(x)
        return self.top(self.pooled(x) + self.last(self.second(x)))


for name, (rank, layers) in KINDS.items():
    try:
        torch.manual_seed(0)
        y = torch.arange(30) % 3
        x = torch.randn(30, 1, *[6] * rank) + y.reshape(-1, 1, *[1] * rank) / 2
        task = ImageClassification.from_arrays(x, y, ["a", "b", "c"])
        model = MultiExit(Net(rank, layers()).eval(), [HeadSpec("pooled", 8)], [2], 3, "max_probability")
        model.thresholds.fill_(0.4)
        with tempfile.TemporaryDirectory() as place:
            result = export_bundle(model, task, f"{place}/b", ExportOptions(), parity_rows=6)
            passed = verify(result.path, threads=1).passed
        print(f"{'right' if passed else 'wrong'} {name}: exported, verified {passed}")
    except Exception as error:
        print(f"wrong {name}: {type(error).__name__}: {str(error)[:150]!r}")
