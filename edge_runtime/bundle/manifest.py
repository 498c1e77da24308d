"""The bundle's manifest: the one contract between the machine that exports and the device that runs.

A bundle is an immutable folder, or the same files in a zip::

    manifest.json      this schema
    manifest.sha256    sha256 of manifest.json, hex, one line
    model.onnx         also carries labels, preprocessing and exits in its metadata
    model.onnx.data    only for models whose weights are stored externally
    split/level0.onnx  only with `split`: the same network, a file for every exit and one for its end
    golden.npz         cases with inputs and expected outputs, see `GoldenCase`
    edge_runtime.pyz   this package, runnable with numpy and onnxruntime
    tokenizer.json     of a model that reads texts, if it was known

Standard library only. Everything here is plain data:
`Manifest.from_json(manifest.to_json())` is the identity.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import BundleError
from .typed_json import DAMAGED, strict_json, typed

SCHEMA_VERSION = 2
_READ = (1, SCHEMA_VERSION)

MANIFEST_FILE = "manifest.json"
MANIFEST_HASH_FILE = "manifest.sha256"
MODEL_FILE = "model.onnx"
GOLDEN_FILE = "golden.npz"
RUNTIME_FILE = "edge_runtime.pyz"
SPLIT_FOLDER = "split"
TOKENIZER_FILE = "tokenizer.json"

LABEL, SCORES, EXIT_INDEX, LOGITS = "label", "scores", "exit_index", "logits"
"""Output names: a model with exits has LABEL, SCORES, EXIT_INDEX; LOGITS where a task does not name its outputs."""

DECIDED = "decided"
"""Output of a file of `SplitSpec`, bool [N]: which rows leave behind it. The last file has none."""

PAST, PRESENT = "past.", "present."
"""What the names of a generator's cache begin with, as inputs, which may be empty, and as outputs."""

LOGITS_FROM = "logits_from"
"""Input of a generator with a default, int64 [1]: the first new token that gets logits; 0 all, -1 the last alone."""

POSITIONS, END_TOKENS = "edgewright.positions", "edgewright.end_tokens"
"""Metadata keys of a generator's model.onnx, JSON: its longest sequence or null, and the tokens that end an answer."""

POSITIONS_REASON = "edgewright.positions_reason"
"""Metadata key beside `POSITIONS`, text: why it ends there, where that is earlier than the model's own end."""

LABELS = "edgewright.labels"
"""Metadata key of model.onnx, JSON: names of the classes, none for a task without classes."""

ANSWERS = "edgewright.answers"
"""Metadata key of model.onnx, JSON: the manifest's answers. Files of the first schema have none."""

THRESHOLDS = "thresholds"
"""Name of the outer initializer, float32 [K], whose values the runtime may replace when it loads the model.

It lies inside model.onnx, never in an external file, and no exporting step may fold it.
"""


@dataclass(frozen=True)
class TensorSpec:
    """One graph input or output.

    A string in `shape` is a named dynamic axis, e.g. ``("batch", 3, 32, 32)``.
    """

    name: str
    dtype: str
    """numpy name: float32, int64, ..."""
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class DecoderSpec:
    """How the raw head of a detector [N, A, 4 + C] becomes boxes; see `answers.decoders`."""

    name: str
    """``grid``: a box at every cell of some strides; ``ssd``: offsets of anchors."""
    size: tuple[int, int]
    """(height, width) of the model's input in pixels."""
    strides: tuple[int, ...] = ()
    """Of ``grid``, in the order of the places."""
    anchors: tuple[tuple[float, float, float, float], ...] = ()
    """Of ``ssd``: middle x, middle y, width and height of every place, in pixels."""
    weights: tuple[float, ...] = ()
    """Of ``ssd``: what the four numbers of a box were multiplied by."""
    score_threshold: float = 0.25
    """Probability from which a box counts."""
    iou_threshold: float = 0.5
    """Of two boxes of one class that overlap by more, only the surer one is answered."""
    most: int = 100
    """Boxes of one row at most."""


@dataclass(frozen=True)
class AnswerSpec:
    """One answer of a model, as a task declares it and a manifest records it."""

    name: str
    """Of the answer, and of the graph's output; the outputs of ``exits`` have names of their own."""
    kind: str
    """A key of `answer.KINDS`, which says what it means."""
    labels: tuple[str, ...] = ()
    """Names of the classes, or of the columns of ``values``."""
    unit: str = ""
    """Of ``values``, once `scale` and `offset` are applied; text for people."""
    scale: tuple[float, ...] = ()
    """Of ``values``: what `predict` multiplies the output by, one number or one for each column (axis 1)."""
    offset: tuple[float, ...] = ()
    """Of ``values``: what `predict` adds after that; so standardised targets come back in the unit of the data."""
    thresholds: tuple[float, ...] = ()
    """Of ``multilabel``: the probability from which a class counts, one number or one for each; none: 0.5."""
    decoder: DecoderSpec | None = None
    """Of ``boxes``."""
    leaf: int | str | None = None
    """Where the answer lies in what the model returns: an index of a tuple, a key of a mapping; None: it is all."""


@dataclass(frozen=True)
class FileEntry:
    """Size and hash of one file of the bundle."""

    bytes: int
    sha256: str


APPLIED, IGNORED, DROPPED = "applied", "ignored", "dropped"
"""What `Preprocessing` says of orientation and alpha."""


@dataclass(frozen=True)
class Preprocessing:
    """How what a user has becomes the float32 input; float arrays are taken as already preprocessed.

    By `kind`:

    * ``"image"``: resize to `size`, times `scale`, minus `mean`, over `std`. Applied by `predict` to integer arrays
      [H, W, C] or [N, H, W, C] and to image files.
    * ``"table"``: the `columns` of a CSV file, minus `mean`, over `std`; of a series the last `window` rows.
    * ``"text"``: the first `window` tokens, filled up with `padding`; ``tokenizer.json`` lies in the bundle.
    * ``"sound"``: the mean of a wav file's channels at `rate` samples a second, the `window` samples in its middle.
    * ``"none"``.
    """

    kind: str = "none"
    size: tuple[int, int] | None = None
    """(height, width) in pixels."""
    channels: int = 3
    scale: float = 1.0
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    max_value: float | None = None
    """The pixel value that stands for white, and the largest that is taken: 65535 for 16 bits, 4095 for 12. Pixels of a
    smaller range, such as 8 bits, are stretched to it; `scale` comes after that. None: 8 bits alone, white is 255."""
    orientation: str = APPLIED
    """Of image files: ``"applied"``, turned as their EXIF tag says, or ``"ignored"``; what training did."""
    alpha: str = DROPPED
    """Of image files: transparency is dropped, not composited."""
    columns: tuple[str, ...] = ()
    """Of tables: names of the columns, in the order of the input's."""
    window: int | None = None
    """Of tables that are a series: rows that the input [N, columns, window] holds; None: a row is an input.
    Of texts the tokens, of sounds the samples that the input [N, window] holds."""
    padding: int = 0
    """Of texts: the token that fills up."""
    rate: int | None = None
    """Of sounds: samples a second."""


@dataclass(frozen=True)
class ExitSpec:
    """One way out of the network, in order of depth; the last entry is the network's own end."""

    index: int
    name: str
    """module path the head reads, ``"final"`` for the last."""
    macs: int
    """MACs of one row that leaves here: everything executed up to here, all heads passed included."""
    attention_macs: int = 0
    """QK^T and AV products among the executed nodes, not part of `macs`."""


@dataclass(frozen=True)
class PolicySpec:
    """The rule that decides who leaves.

    `never` and `always` are the thresholds that switch it off or force it; every other one lies between them.
    """

    name: str
    never: float
    always: float
    excludes: bool = False
    """whether it rules classes out: those have a score of exactly 0, and a row that leaves early has 1 for the class
    that is left, which is no probability."""


@dataclass(frozen=True)
class OperatingPoint:
    """A validated setting of the thresholds; `metrics` were measured on the validation split."""

    name: str
    thresholds: tuple[float, ...]
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Tolerances:
    """What `verify` holds a run to.

    An element passes if ``|a - b| <= abs + rel * |b|``; NaN against a number never passes.
    `reference` compares with this same file on the exporting machine's CPU, `torch` with the compressed
    PyTorch model.
    Labels, exits and excluded classes must be equal, except where a case's `margin` is at most `flip_margin`.
    """

    reference_abs: float = 1e-4
    reference_rel: float = 1e-4
    torch_abs: float = 1e-4
    torch_rel: float = 1e-4
    flip_margin: float = 0.0
    """Twice the largest error of a logit measured at export; a decision whose margin is no larger may flip."""


@dataclass(frozen=True)
class LedgerRow:
    """One initializer of the exported file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    sha256: str
    graph: str
    """``""`` for the main graph, else the path of the branch, e.g. ``"exit0.else/exit1.else"``."""
    readers: tuple[str, ...] = ()
    """names of the nodes that read it."""


@dataclass(frozen=True)
class Ledger:
    """Where the bytes are, stage by stage; proves that shared storage stays shared."""

    torch_unique_bytes: int
    """unique parameter and buffer storage of the PyTorch model."""
    raw_unique_bytes: int
    """unique initializer contents of the freshly captured graph."""
    unique_weight_bytes: int
    """distinct initializer contents of model.onnx."""
    stored_weight_bytes: int
    """all initializers of model.onnx, copies counted: parameters and buffers that run, and constants of the model.

    Two tensors of equal content, such as biases that are still zero, count twice here and in PyTorch.
    """
    runtime_weight_bytes: int | None
    """all initializers after ONNX Runtime optimized the graph for the CPU (basic level), if measured."""
    rows: tuple[LedgerRow, ...] = ()
    shared: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """initializer name -> module paths that share it, for every basis used by at least two modules."""


@dataclass(frozen=True)
class NodeRow:
    """One node of the exported graph, in all nesting levels."""

    name: str
    op: str
    outputs: tuple[str, ...]
    module: str
    """torch module path it came from; ``""`` for nodes of the exporter's own making."""
    exit: int
    """smallest exit index whose decision needs this node."""
    macs: int
    """multiply-accumulates of one row with a weight: convolutions, matrix products, recurrent layers."""
    attention_macs: int
    """multiply-accumulates of a product of two activations."""
    weight_bytes: int


@dataclass(frozen=True)
class Flip:
    """A label or exit that differs between PyTorch and ONNX; its margin is within numeric error."""

    split: str
    row: int
    """index in the split."""
    kind: str
    """``"label"``, ``"exit"``, or ``"excluded"``: only the set of excluded classes differs."""
    torch: int
    onnx: int
    margin: float
    """of several places of a row, such as pixels, the widest."""
    case: str = ""
    """how the row was run, e.g. ``"exit 1 forced"`` or ``"batch of 7"``; empty for the plain split, at ONNX Runtime's
    default optimization level."""
    answer: str = ""
    """name of the answer, where the model has several."""
    places: int = 1
    """how many places of the row differ, such as pixels of a class map."""


@dataclass(frozen=True)
class ParityReport:
    """PyTorch against ONNX Runtime (CPU, fp32), over the natural cases and every forced exit."""

    max_abs_diff: float
    fraction_outside: float
    """share of elements outside the torch tolerance (trtexec's l0)."""
    rows: int
    label_agreement: float | None
    """share of rows (of pixels in a class map, of positions where tokens follow), excused flips counted as
    disagreeing; None: nothing is decided, so that there is nothing to agree on."""
    exit_agreement: float
    exits_covered: int
    exits_total: int
    excused: tuple[Flip, ...] = ()
    optimization_levels: Mapping[str, float] = field(default_factory=dict)
    """max |diff| at each ONNX Runtime graph optimization level."""


@dataclass(frozen=True)
class SplitSpec:
    """The network with exits as files that a host runs in turn, each with the rows that the earlier ones left.

    A file reads inputs of the network and outputs of earlier files, by name. Beside what later files read it gives
    label int64 [N], scores float32 [N, C] and, but for the last, `DECIDED`. It has an initializer `THRESHOLDS` [1].
    """

    files: tuple[str, ...]
    """one for every exit, in order."""
    row_axes: Mapping[str, int]
    """value that later files read -> its axis that counts the rows; a value not listed has none. Empty with
    ``batch: single``."""
    unique_weight_bytes: int
    """distinct initializer contents of all files."""
    stored_weight_bytes: int
    """all initializers of all files: what several levels read is in each of their files."""


@dataclass(frozen=True)
class SplitRatio:
    """Time of the split layout over that of ``model.onnx``, with its 95 % interval."""

    value: float
    low: float
    high: float
    verdict: str
    """``"faster"`` or ``"slower"``: the split layout is; ``"inconclusive"``: the interval reaches too near 1."""


@dataclass(frozen=True)
class DeviceLatency:
    """What a row that leaves at each exit costs on one device, the network's end last; from `latency_table`."""

    device: str
    """processor or board, ONNX Runtime, the providers that took nodes, and threads."""
    fingerprint: str
    """as `doctor` has it: equal where two measurements are comparable."""
    optimization_level: str
    exits_us: Mapping[str, tuple[float, ...]]
    """layout, ``"file"`` or ``"split"`` -> microseconds by exit."""
    split_over_file: tuple[SplitRatio, ...] = ()
    """by exit; empty without a split layout."""


@dataclass(frozen=True)
class Manifest:
    """Everything a device needs to know about a bundle, and everything a reader needs to trust it."""

    name: str
    batch: str
    """``"single"``: one row a run; ``"dynamic"``: any number of rows, all run to the end; ``"compact"``: any number,
    none included, and rows that an exit decides leave before the next level."""
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    answers: tuple[AnswerSpec, ...]
    """what the outputs mean; a generator's cache is among the outputs and no answer."""
    preprocessing: Preprocessing
    exits: tuple[ExitSpec, ...]
    policy: PolicySpec | None
    operating_points: tuple[OperatingPoint, ...]
    """first entry = the values stored in the graph."""
    tolerances: Tolerances
    parity: ParityReport
    ledger: Ledger
    nodes: tuple[NodeRow, ...]
    edits: tuple[Mapping[str, Any], ...]
    """what each compression stage did, as in the checkpoint."""
    opset: int
    ir_version: int
    versions: Mapping[str, str]
    notes: tuple[str, ...] = ()
    """decisions worth knowing, e.g. why a simplifier's result was not kept."""
    split: SplitSpec | None = None
    """the levels as files of their own, if the export was asked for them."""
    measured: tuple[DeviceLatency, ...] = ()
    """what devices measured and `record_latency` wrote here; empty as exported: two exports are the same bytes."""
    files: Mapping[str, FileEntry] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes of the first answer that has any; empty if none has."""
        from ..answers.table import KINDS  # needs NumPy, which a command's help does without

        return next((a.labels for a in self.answers if a.labels and KINDS[a.kind].decides), ())

    def to_json(self) -> str:
        """Canonical JSON text: sorted keys, two spaces, newline at the end, no timestamps."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Parses and checks a manifest.

        Raises:
            BundleError: not JSON, another schema version, or a field that is missing, unknown or of a
                wrong type.
        """
        try:
            data = strict_json(text)
        except (ValueError, RecursionError) as error:
            raise BundleError(
                f"{MANIFEST_FILE} is not JSON ({error}); the bundle is damaged: export it again"
            ) from None
        if not isinstance(data, dict):
            raise BundleError(f"{MANIFEST_FILE} does not hold an object; the bundle is damaged: export it again")
        version = data.get("schema_version")
        if isinstance(version, bool) or version not in _READ:
            raise BundleError(
                f"{MANIFEST_FILE} has schema_version {version!r}, this runtime reads {' and '.join(map(str, _READ))}: "
                "use the edge_runtime.pyz that lies in the bundle, or export again"
            )
        if version == 1:
            data = _from_first_schema(data)
        if isinstance(preprocessing := data.get("preprocessing"), dict):
            # exported before the field existed: trained on pixels as stored
            preprocessing.setdefault("orientation", IGNORED)
        return typed(cls, data, MANIFEST_FILE)  # type: ignore[no-any-return]


def _from_first_schema(data: dict[str, Any]) -> dict[str, Any]:
    """The same as the schema of today has it: labels were the manifest's, and the only answer had no kind.

    Raises:
        BundleError: a field that is needed for it is missing or of a wrong type.
    """
    from ..answers.table import answers_by_names  # as above

    for name in ("labels", "outputs", "inputs"):
        if name not in data:
            raise BundleError(f"{MANIFEST_FILE} lacks the field {name!r}{DAMAGED}")
    labels = typed(tuple[str, ...], data["labels"], f"{MANIFEST_FILE}.labels")
    inputs, outputs = (
        typed(tuple[TensorSpec, ...], data[name], f"{MANIFEST_FILE}.{name}") for name in ("inputs", "outputs")
    )
    answers = answers_by_names(
        {spec.name: len(spec.shape) for spec in outputs if not spec.name.startswith(PRESENT)},
        labels,
        exits=data.get("policy") is not None,
        tokens=any(spec.dtype == "int64" for spec in inputs),
    )
    rest = {key: value for key, value in data.items() if key != "labels"}
    tolerances = data.get("tolerances")
    if any(spec.name.startswith(PRESENT) for spec in outputs) and isinstance(tolerances, dict):
        # tokens were compared as numbers alone: a flip within their tolerance is no news
        rest["tolerances"] = {**tolerances, "flip_margin": tolerances.get("torch_abs", 0.0)}
    return {**rest, "answers": json.loads(json.dumps([*map(dataclasses.asdict, answers)])), "schema_version": 2}


@dataclass(frozen=True)
class GoldenCase:
    """One recorded run. In golden.npz its arrays are ``<index:04d>/<group>/<name>``.

    Groups: ``input/<input name>``, ``torch/<output name>``, ``reference/<output name>``, ``margin`` (float32 [N], of
    the kinds ``classes`` and ``exits``, other margins are told by the outputs: every logit of the row may move by less
    than this and its exit, label and excluded classes stay; a logit of a head whose measured error is a part of the
    largest one, by less than that part of it), and for models with
    exits ``thresholds`` (float32 [K], the values this case ran with). `inputs` hold what the graph takes, already
    preprocessed.
    """

    inputs: Mapping[str, Any]
    torch: Mapping[str, Any]
    reference: Mapping[str, Any]
    thresholds: Any | None = None
    margin: Any | None = None
