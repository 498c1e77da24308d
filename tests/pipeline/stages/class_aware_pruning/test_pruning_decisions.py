"""Values that become places: what follows the channels must not become an address."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from edgewright.pipeline.analysis.channels import surgery
from edgewright.pipeline.analysis.channels.finding import find_channels

IMAGES = torch.randn(2, 3, 10, 10, generator=torch.Generator().manual_seed(5))


class Deformable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.places, self.conv = nn.Conv2d(8, 18, 3, 1, 1), torchvision.ops.DeformConv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x, self.places(x))
        return y


class Regions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        corners = self.places(x.mean(dim=(2, 3))).sigmoid() * 4
        rows = torch.arange(len(x)).to(x)[:, None]
        boxes = torch.cat([rows, corners[:, :2], 4 + corners[:, 2:]], dim=1)
        y: Tensor = torchvision.ops.roi_align(x, boxes, (8, 8))
        return y


class Warped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.grid_sample(x, self.places(x).tanh().movedim(1, -1), align_corners=False)


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.places, self.table = nn.Conv2d(8, 1, 1), nn.Embedding(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        rows: Tensor = self.table((self.places(x).sigmoid() * 15.99).long().squeeze(1))
        return x + rows.movedim(-1, 1)


class Scattered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Conv2d(8, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        index = (self.places(x).sigmoid() * 63.99).long().flatten(2).expand(-1, x.shape[1], -1)
        return torch.zeros_like(x).flatten(2).scatter_add(2, index, x.flatten(2)).view_as(x)


class Routed(nn.Module):
    """One row of a table of scales, the likeliest, and as a Python number the place of another."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.table = nn.Linear(8, 4), nn.Parameter(torch.rand(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        choice = self.places(x.mean(dim=(2, 3)))
        y = x * self.table[choice.argmax(dim=1)][:, :, None, None]
        return y * self.table[int(choice.topk(2, dim=1).indices[0, 1])][:, None, None]


KINDS: dict[str, tuple[type[nn.Module], list[str], str]] = {
    "deformable": (Deformable, ["3"], "deform_conv2d in '2.conv'"),
    "regions": (Regions, ["0", "3"], "roi_align in '2'"),
    "warped": (Warped, ["0", "3"], "grid_sampler_2d in '2'"),
    "table": (Table, ["0", "3"], "_to_copy in '2'"),
    "scattered": (Scattered, ["0", "3"], "_to_copy in '2'"),
    "routed": (Routed, ["0", "3"], "argmax in '2'"),
}


def around(middle: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), middle(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(6, 4),
    ).eval()  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_the_layers_around_are_pruned_and_the_places_are_named(kind: str) -> None:
    middle, names, reason = KINDS[kind]
    model = around(middle)
    channels = find_channels(model, (IMAGES[:1],))
    assert [g.name for g in channels.groups] == names
    assert reason in channels.refused["2.places"]
    keep = channels.keep({g.name: torch.arange(1, g.units) for g in channels.groups})
    with torch.no_grad():
        expected, found = surgery.masked(model, keep)(IMAGES), surgery.pruned(model, keep)(IMAGES)
    assert torch.allclose(found, expected, atol=1e-5)


def test_channels_that_only_choose_an_entry_say_so() -> None:
    class Codebook(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.codes = nn.Parameter(torch.randn(16, 8))

        def forward(self, x: Tensor) -> Tensor:
            y = x.movedim(1, -1)
            nearest = torch.cdist(y.flatten(0, 2), self.codes).argmin(dim=1)
            return self.codes[nearest].view(y.shape).movedim(-1, 1)

    channels = find_channels(around(Codebook), (IMAGES[:1],))
    assert "argmin in '2'" in channels.refused["0"]


def test_marks_pass_where_a_model_cleans_or_gates_by_comparison() -> None:
    class Gated(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x > 0, torch.nan_to_num(x), 0.1 * x)

    channels = find_channels(around(Gated), (IMAGES[:1],))
    assert [g.name for g in channels.groups] == ["0", "3"]
