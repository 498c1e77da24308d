"""Label smoothing of losses that are more than a plain cross entropy; right is what torch's own argument gives."""

import warnings

import torch
from torch import nn
from torch.nn import functional as F

from edgewright.edge_runtime.errors import InputError
from edgewright.pipeline import ImageClassification
from edgewright.pipeline.task import Batch
from edgewright.pipeline.tasks.causal_lm import CausalLM
from edgewright.pipeline.training.training import TrainingConfig, task_loss

warnings.filterwarnings("ignore")
SHARE = 0.2
RARE = torch.tensor([0.1, 4.0, 1.0])
torch.manual_seed(5)
LOGITS, TARGETS = torch.randn(5, 3), torch.tensor([2, 0, -100, 1, 1])
MAP, PIXELS = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
NOTHING = torch.full((2, 4, 4), -100)


class Own(ImageClassification):
    def __init__(self, loss):
        super().__init__({"train": (torch.zeros(3, 2), torch.arange(3))}, ["a", "b", "c"])
        self.own = loss

    def loss(self, logits, targets):
        return self.own(logits, targets)


def tell(name, task, logits, targets, right):
    try:
        loss = task_loss(task, TrainingConfig(label_smoothing=SHARE))(nn.Identity(), Batch((logits,), targets))
    except InputError as error:
        print(f"{'right' if right is None else 'wrong'} {name}: refused, {str(error)[:120]!r}", flush=True)
    except Exception as error:
        print(f"wrong {name}: {type(error).__name__}: {str(error)[:150]!r}", flush=True)
    else:
        good = right is not None and torch.allclose(loss, right, rtol=1e-5, equal_nan=True)
        print(f"{'right' if good else 'wrong'} {name}: {float(loss):.5f}, wanted {right}", flush=True)


def smooth(x, y, **more):
    return F.cross_entropy(x, y, label_smoothing=SHARE, **more)


for name, own, right in (
    ("plain", F.cross_entropy, smooth(LOGITS, TARGETS)),
    ("weighted", nn.CrossEntropyLoss(RARE), smooth(LOGITS, TARGETS, weight=RARE)),
    ("other_ignored", lambda x, y: F.cross_entropy(x, y, ignore_index=1), None),
    ("scaled_and_more", lambda x, y: 3 * F.cross_entropy(x, y) + x.norm(), 3 * smooth(LOGITS, TARGETS) + LOGITS.norm()),
    ("log_softmax", lambda x, y: F.nll_loss(x.log_softmax(1), y), smooth(LOGITS, TARGETS)),
    ("squares", lambda x, y: (x - F.one_hot(y.clamp_min(0), 3)).square().mean(), None),
    ("smoothed_already", nn.CrossEntropyLoss(label_smoothing=0.1), None),
):
    y = TARGETS.clamp_min(0) if name == "other_ignored" else TARGETS
    tell(name, Own(own), LOGITS, y, smooth(LOGITS, y, ignore_index=1) if name == "other_ignored" else right)
tell("pixels", Own(F.cross_entropy), MAP, PIXELS, smooth(MAP, PIXELS))
for window in (3, 6):
    tokens = torch.arange(4 * window).reshape(4, window) % 3
    task = CausalLM({"train": tokens}, 3)
    batch = task.splits["train"].batch([0, 1, 2])
    logits = torch.randn(3, window, 3)
    tell(f"words_{window}", task, logits, batch.targets, smooth(logits.flatten(0, 1), batch.targets.flatten()))
