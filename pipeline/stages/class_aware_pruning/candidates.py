"""What one iteration removes: scores of the model as it is, and the selection by them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ...analysis.channels.flow import Axis
from ...analysis.channels.groups import ChannelGroup, Channels
from ...task import names_of_classes, split_of
from .criteria import filter_scores, unit_scores
from .feature_maps import Moments, collect_moments, correlations
from .iterations import Progress
from .scored_samples import ScoredSamples
from .scores import FilterStatistics, collect
from .selection import Selection, select
from .setup import NAME, Setup


def choose(setup: Setup, progress: Progress, channels: Channels, number: int) -> Selection:
    """Scores the filters of `progress.model` and selects; leaves the scores in `progress.artifacts`.

    Args:
        setup: see there.
        progress: notes are added in the first iteration.
        channels: of `progress.model`.
        number: of the iteration, from 1.
    """
    config, context, criterion = setup.config, setup.context, setup.criterion
    layers = list(dict.fromkeys(path for group in channels.groups for path in group.producers))
    statistics: dict[str, FilterStatistics] = {}
    counted: dict[str, Tensor] = {}
    names = names_of_classes(setup.task)
    if criterion.needs_statistics or config.needs_loss:
        split = split_of(setup.task, config.score_split, NAME)
        samples = ScoredSamples(setup.task, split)
        statistics = collect(progress.model, layers, samples, config.scoring(), context)
        if samples.unseen and number == 1:
            progress.notes.append(
                f"no sample of the {config.score_split!r} split shows {', '.join(map(repr, samples.unseen[:5]))} "
                f"({len(samples.unseen)} of {len(names)} classes): filters are scored without them"
            )
        for path, found in statistics.items() if samples.unseen != names else ():
            counted[f"class_count.{path}"] = found.class_count
            counted[f"class_counts.{path}"] = samples.by_class(found.per_class)
    alike = None
    if criterion.needs_feature_maps:
        alike = correlations(channels.groups, moments_of(setup, progress.model, channels.groups))
    scores = filter_scores(criterion, progress.model, statistics, channels.groups, context, number, alike)
    units = {g.name: unit_scores(g, scores, statistics, progress.model) for g in channels.groups}
    progress.artifacts = {f"scores.{path}": score.to(torch.float32) for path, score in scores.items()} | counted
    if criterion.needs_statistics and names and number == 1:
        _note_thresholds(setup, progress, statistics, len(names))
    full_scale = criterion.full_scale(len(names))
    return select(
        channels, units, setup.target.original, full_scale, setup.target.next_limit(channels.macs({})), config
    )


def moments_of(setup: Setup, model: nn.Module, groups: Sequence[ChannelGroup]) -> dict[str, dict[Axis, Moments]]:
    """What the feature maps of `groups` have in common, on the split that scores come from."""
    split = split_of(setup.task, setup.config.score_split, NAME)
    return collect_moments(model, groups, split, setup.config.score_batch_size, setup.context)


def _note_thresholds(
    setup: Setup, progress: Progress, statistics: Mapping[str, FilterStatistics], classes: int
) -> None:
    """Says where class counts rest on a relative `tau`, and where they say nothing."""
    relative = [path for path, found in statistics.items() if found.relative_tau is not None]
    if relative and setup.config.tau_mode == "auto":
        progress.notes.append(
            f"{len(relative)} of {len(statistics)} layers, {relative[0]!r} first, are never exactly 0 (no ReLU behind "
            f"them): a filter counts there above {statistics[relative[0]].relative_tau} times the layer's mean"
        )
    full = sum(int((s.class_count >= classes).sum()) for s in statistics.values())
    total = sum(len(s.class_count) for s in statistics.values())
    if full > 0.98 * total:
        progress.notes.append(
            f"{full} of {total} filters count for every class, so class counts say nothing: use tau_mode: relative "
            "with a larger tau (0.3, 1.0)"
        )
