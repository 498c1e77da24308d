"""What distillation gives back of what sharing took from an encoder without a head, in cosine to the dense vectors.

A byte encoder is trained on Python's own documentation by filling in masked bytes; its vector of a window is the mean
over the places. Then 30 % of the bytes of layers go, with and without recovery by the dense encoder, without labels.
Resumable: finished steps lie in the folder.

    python benchmarks/encoder.py FOLDER [--epochs 12] [--steps 600] [--ratio 0.3] [--seed 0]
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

import torch
from torch import Tensor, nn

from edgewright.pipeline.stages.basis_sharing.config import BasisSharingConfig
from edgewright.pipeline.stages.basis_sharing.stage import fit
from edgewright.pipeline.store.context import FolderContext
from edgewright.pipeline.task import Batch
from edgewright.pipeline.tasks.embedding import Embedding, vectors_of
from edgewright.pipeline.tasks.shipped.causal_lm import causal_lm
from edgewright.pipeline.training.training import TrainingConfig, train_model

_WINDOW, _WIDTH, _LAYERS, _HEADS, _BYTES, _MASK = 64, 96, 4, 4, 256, 256
_HIDDEN_SHARE = 0.15
_FRACTIONS = {"train": 0.6, "calibration": 0.1, "validation": 0.1, "test": 0.2}


class Block(nn.Module):
    """Attention and a layer of twice the width, each on its normalised input."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(_WIDTH), nn.LayerNorm(_WIDTH)
        self.query, self.key, self.value, self.out = (nn.Linear(_WIDTH, _WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(_WIDTH, 2 * _WIDTH), nn.Linear(2 * _WIDTH, _WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """[N, T, D] to the same."""
        y = self.before(x)
        parts = (layer(y).unflatten(2, (_HEADS, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        x = x + self.out(nn.functional.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.between(x))))


class Encoder(nn.Module):
    """Bytes int64 [N, T] to a vector float32 [N, D]."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(_BYTES + 1, _WIDTH), nn.Embedding(_WINDOW, _WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(_LAYERS)))
        self.last = nn.LayerNorm(_WIDTH)

    def states(self, ids: Tensor) -> Tensor:
        """[N, T, D]."""
        return self.last(self.blocks(self.bytes(ids) + self.places.weight[: ids.shape[1]]))

    def forward(self, ids: Tensor) -> Tensor:
        """The mean over the places."""
        return self.states(ids).mean(dim=1)


class Filling(nn.Module):
    """An encoder with a head that says which byte was at each place."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = Encoder(), nn.Linear(_WIDTH, _BYTES)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits [N, T, 256]."""
        return self.head(self.encoder.states(ids))


def filling_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Cross entropy of the bytes that were masked."""
    ids = batch.inputs[0]
    hidden = torch.rand(ids.shape) < _HIDDEN_SHARE
    logits = model(ids.masked_fill(hidden, _MASK))
    return nn.functional.cross_entropy(logits[hidden], ids[hidden])


def compared(model: nn.Module, task: Embedding, centre: Tensor) -> dict[str, float]:
    """Mean cosine over the test split to the dense vectors, as they are and about the mean of the train split."""
    split = task.splits["test"]
    batch = split.batch(range(len(split)))
    found = vectors_of(model, batch.inputs)
    plain = nn.functional.cosine_similarity(found, batch.targets, dim=1)
    about = nn.functional.cosine_similarity(found - centre, batch.targets - centre, dim=1)
    return {"cosine": float(plain.mean()), "smallest": float(plain.min()), "about_the_mean": float(about.mean())}


def main() -> None:
    """Prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--ratio", type=float, default=0.3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    text = causal_lm(tokenizer="bytes", window=_WINDOW, fractions=_FRACTIONS)
    whole = Filling()
    training = TrainingConfig(epochs=args.epochs, batch_size=64, optimizer="adamw", learning_rate=3e-3, warmup=0.1)
    context = FolderContext(args.folder / f"trained.{args.epochs}", args.seed)
    log = train_model(whole, text, training, context, "train", filling_loss)
    dense = whole.encoder.eval()
    splits = {}
    for name, split in text.splits.items():
        ids = split.batch(range(len(split))).inputs[0]
        splits[name] = (ids, vectors_of(dense, [ids]))
    task = Embedding(splits, taught=True, name="encoder", input_name="ids")
    centre = task.splits["train"].targets.mean(dim=0)
    recovery = {"steps": args.steps, "batch_size": 32, "learning_rate": 1e-3, "distillation": 1.0}
    rows = {"dense": compared(dense, task, centre)}
    found = {}
    for name, options in (("shared", {}), ("recovered", {"recovery": recovery})):
        config = BasisSharingConfig.model_validate({"ratio": args.ratio, **options})
        kept = args.folder / f"{name}.{args.epochs}.{args.ratio}.{args.steps}"
        result = fit(copy.deepcopy(dense), task, config, FolderContext(kept, args.seed))
        rows[name] = compared(result.model, task, centre)
        found[name] = sum(p.numel() for p in result.model.parameters())
    lost = {key: rows["dense"][key] - rows["shared"][key] for key in rows["dense"]}
    back = {key: (rows["recovered"][key] - rows["shared"][key]) / lost[key] for key in lost if lost[key] > 0}
    parameters = {"dense": sum(p.numel() for p in dense.parameters()), **found}
    print(
        json.dumps(
            {"loss": [row["loss"] for row in log][-1], "rows": rows, "recovered": back, "parameters": parameters},
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
