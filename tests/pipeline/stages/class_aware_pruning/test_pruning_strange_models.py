"""What strangers' models do with their channels: halves, heads that share keys, branches that only training takes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from edgewright.pipeline.analysis.channels import surgery
from edgewright.pipeline.analysis.channels.finding import find_channels
from edgewright.pipeline.analysis.channels.groups import Channels
from edgewright.pipeline.analysis.cost import count
from edgewright.pipeline.errors import StageError

IMAGES = torch.randn(3, 1, 12, 12, generator=torch.Generator().manual_seed(5))


def producers(channels: Channels) -> dict[str, tuple[str, ...]]:
    return {g.name: g.producers for g in channels.groups}


class Halves(nn.Module):
    """One convolution's channels split by `chunk`, one half processed twice, all of them joined; [N, 1, 12, 12]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 1)
        self.inner = nn.ModuleList(nn.Conv2d(8, 8, 3, 1, 1) for _ in range(2))
        self.fc = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        parts = list(torch.relu(self.stem(x)).chunk(2, dim=1))
        for conv in self.inner:
            parts.append(torch.relu(conv(parts[-1])))
        logits: Tensor = self.fc(torch.cat(parts, dim=1).mean(dim=(2, 3)))
        return logits


def test_halves_of_a_layer_stay_equally_wide() -> None:
    torch.manual_seed(0)
    model = Halves().eval()
    channels = find_channels(model, (IMAGES[:1],))
    stem = channels.groups[0]
    # unit j has channel j of either half: cut by different numbers, `chunk` would draw the line elsewhere
    assert stem.members[("stem", "out")].tolist() == [[j, j + 8] for j in range(8)]
    keep = channels.keep({"stem": torch.tensor([0, 1, 5]), "inner.1": torch.tensor([2, 7])})
    small, dense = surgery.pruned(model, keep), surgery.masked(model, keep)
    with torch.no_grad():
        assert torch.allclose(small(IMAGES), dense(IMAGES), atol=1e-5)


class Auxiliary(nn.Module):
    """A second classifier that only training uses; [N, 1, 12, 12]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.top, self.fc = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)
        self.auxiliary = nn.Sequential(
            nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(600, 4)
        )
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        logits: Tensor = self.fc(torch.relu(self.top(x)).mean(dim=(2, 3)))
        if self.training:
            self.calls += 1
            logits = logits + 0.3 * self.auxiliary(x)
        return logits


def test_layers_that_run_in_training_only_are_narrowed_along() -> None:
    torch.manual_seed(0)
    model = Auxiliary().eval()
    before = copy.deepcopy(model.state_dict())
    channels = find_channels(model, (IMAGES[:1],))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert producers(channels) == {"stem": ("stem",), "top": ("top",)}
    assert "in training only" in channels.refused["auxiliary.0"]
    assert channels.macs({}) == count(model, (IMAGES[:1],)).macs
    small = surgery.pruned(model, channels.keep({"stem": torch.tensor([1, 4])}))
    assert small.auxiliary[0].in_channels == 2
    assert small.train()(IMAGES).shape == (3, 4)


def test_a_training_branch_that_takes_the_place_of_another_is_refused() -> None:
    class Fused(nn.Module):
        """Two branches in training, one convolution otherwise."""

        def __init__(self) -> None:
            super().__init__()
            self.one, self.other, self.fused = (nn.Conv2d(1, 4, 3) for _ in range(3))
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.one(x) + self.other(x) if self.training else self.fused(x)
            logits: Tensor = self.fc(torch.relu(y).mean(dim=(2, 3)))
            return logits

    with pytest.raises(StageError, match="runs 'one' in training only, and leaves 'fused' out there"):
        find_channels(Fused().eval(), (IMAGES[:1],))


class SharedKeys(nn.Module):
    """Attention of eight query heads of which each four share a key and a value; tokens are the image's rows."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(12, 32), nn.Linear(12, 8), nn.Linear(12, 8)
        self.out, self.fc = nn.Linear(32, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, 0]
        q, k, v = (layer(x).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        shares = (q @ k.repeat_interleave(4, 1).transpose(-2, -1)).softmax(dim=-1)
        y = (shares @ v.repeat_interleave(4, 1)).transpose(1, 2).flatten(2)
        logits: Tensor = self.fc((x + self.out(y)).mean(dim=1))
        return logits


def test_a_shared_key_goes_with_all_of_its_heads() -> None:
    torch.manual_seed(0)
    model = SharedKeys().eval()
    channels = find_channels(model, (IMAGES[:1],))
    (heads,) = channels.groups
    assert heads.producers == ("q", "k", "v") and heads.units == 2
    assert heads.members[("q", "out")][1].tolist() == list(range(16, 32))
    assert heads.members[("k", "out")].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_tokens_as_many_as_channels_are_no_channels() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.positions = nn.Linear(12, 12), nn.Parameter(torch.randn(1, 12, 12))
            self.up, self.down, self.fc = nn.Linear(12, 8), nn.Linear(8, 12), nn.Linear(12, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x[:, 0]) + self.positions
            logits: Tensor = self.fc((x + self.down(torch.relu(self.up(x)))).mean(dim=1))
            return logits

    channels = find_channels(Positions().eval(), (IMAGES[:1],), prune_residual=True)
    assert producers(channels) == {"embed": ("embed", "down"), "up": ("up",)}
    assert ("positions", "2") in channels.groups[0].members
