"""Exits in front of operators that are exported with bodies: these read what lies outside without saying so."""

import tempfile
import warnings

import torch
from torch import nn
from torch._higher_order_ops.scan import scan
from torch._higher_order_ops.while_loop import while_loop

from edgewright.edge_runtime import verify
from edgewright.export import ExportOptions, export_bundle
from edgewright.models.layers.multi_exit import HeadSpec, MultiExit
from edgewright.pipeline import ImageClassification

warnings.simplefilter("ignore")


class Net(nn.Module):
    """Two levels, then `kind`, which reads values of both and weights."""

    def __init__(self, kind):
        super().__init__()
        self.a, self.b, self.inner, self.top = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.bag = nn.EmbeddingBag(20, 8, mode=kind) if kind in ("sum", "mean", "max") else None
        self.kind = kind

    def forward(self, x):
        h = torch.relu(self.a(x))
        g = self.b(h)
        return self.top(getattr(self, f"_{self.kind}", self._bags)(h, g))

    def _bags(self, h, g):
        return h + self.bag((g[:, :3].abs() * 10).long().clamp(0, 19))

    def _branch(self, h, g):
        def outer(g, h):
            return torch.cond(h.sum() > 1.0, lambda g, h: self.inner(g) + h, lambda g, h: g * h, (g, h))

        return torch.cond(g.sum() > 0, outer, lambda g, h: g - self.inner(h), (g, h))

    def _scan(self, h, g):
        def step(carry, x):
            carry = torch.tanh(self.inner(carry) + x + g)
            return carry, carry.clone()

        carry, each = scan(step, torch.zeros_like(g), torch.stack([h, g, h * g]))
        return carry + each.mean(0)

    def _loop(self, h, g):
        return while_loop(
            lambda i, v: i < 3, lambda i, v: (i + 1, torch.tanh(self.inner(v)) + h), (torch.tensor(0), g)
        )[1]


y = torch.arange(40) % 3
task = ImageClassification.from_arrays(
    torch.randn(40, 6, generator=torch.Generator().manual_seed(0)) + y[:, None] / 2, y, ["a", "b", "c"]
)
# a branch that looks at the whole batch depends on who is in it: one row a run
for kind, batch in (
    ("sum", "single"),
    ("mean", "compact"),
    ("branch", "single"),
    ("scan", "compact"),
    ("loop", "compact"),
):
    try:
        torch.manual_seed(0)
        model = MultiExit(Net(kind), [HeadSpec("a", 8), HeadSpec("b", 8)], [2, 2], 3, "max_probability").eval()
        model.thresholds.fill_(0.4)
        with tempfile.TemporaryDirectory() as place:
            options = ExportOptions(batch=batch, split=True)
            result = export_bundle(model, task, f"{place}/b", options, parity_rows=8)
            passed = verify(result.path, threads=1).passed and verify(result.path, threads=1, layout="split").passed
            said = kind in ("sum", "mean", "max") or any("how often" in note for note in result.manifest.notes)
        right = passed and said
        print(f"{'right' if right else 'wrong'} {kind}: verified {passed}, products in bodies told {said}")
    except Exception as error:
        print(f"wrong {kind}: {type(error).__name__}: {str(error)[:150]!r}")
