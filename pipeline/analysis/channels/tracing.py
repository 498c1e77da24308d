"""Follows channels through a model by what happens to NaN: exact for any operation, and without architecture names.

A mixing layer gets NaN into some of its output channels; whichever input channels of later layers then hold NaN are
fed by them. Every mixing layer cleans its input first, so a NaN travels from one mixing layer to the next and no
further. Which output channel feeds which input channel is read off like a binary number: pass b marks the channels
whose index has bit b, and its counterpart the others; an input channel that both passes reach has several sources.
Reshapes, concatenations, shuffles, gates and pooling need no rules of their own. (torch-pruning's graph, read off the
names of autograd nodes, does not end on swin_t and fails on shufflenet_v2; this does both.)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ...errors import StageError
from .apart import Care, ForeignCodeError
from .axes import Side, channel_dim, has_own_forward, is_depthwise, is_following, is_mixing, width
from .decisions import Decisions, cleaned, is_marked, marked_if_float
from .flow import OUTPUT, Axis, Call, Columns, Flow
from .modes import BufferStates, hooked, plain_eval
from .own_forward import follow_own
from .plain_tensors import drop_single_rows, plain_tensors

Marks: TypeAlias = Mapping[Axis, Tensor]
"""Bool [channels] per source: where NaN is put."""
_MANY = -1
_TRAINING_RUNS = 3


class Tracer:
    """Runs a model with marked channels. Use it once, through `trace`."""

    def __init__(
        self, model: nn.Module, inputs: tuple[Tensor, ...], care: Care, columns: Columns | None = None
    ) -> None:
        self.columns = columns
        self.model = model
        self.inputs = inputs
        self.flow = Flow(care=care)
        self._marks: Marks = {}
        self._seen: dict[Axis, Tensor] = {}
        self._arrived: dict[nn.Module, Tensor] = {}
        self._clean: dict[nn.Module, list[Tensor]] = {}
        self._calls: dict[nn.Module, int] = {}
        self._decisions = Decisions(model, care.operators)
        self._stopped: str | None = None
        self._states: BufferStates | None = None
        self._given: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def trace(self) -> Flow:
        """Finds the flow.

        Raises:
            StageError: the model does not run on the inputs, or leaves layers out in training that it needs otherwise.
        """
        with torch.no_grad(), plain_eval(self.model), hooked(self._watch_calls()):
            self._forward_clean()
        if self.flow.foreign and not self.flow.care.apart:
            raise ForeignCodeError
        self.flow.training_only = self._training_only()
        with torch.no_grad(), plain_eval(self.model):
            follow_own(self.model, self.flow, self._given)
        self._given = {}
        branches = bool(self.flow.training_only)
        with torch.no_grad(), plain_eval(self.model, branches), hooked(self._watch_channels()), self._replayed():
            reach = self._reach()
            self._decode(reach)
            self._find_blocks(reach)
        return self.flow

    def _training_only(self) -> frozenset[str]:
        """Looks for layers that run in training alone; if there are any, `flow.calls` is of that way through the model.

        Code that leaves blocks out at random is asked several times.
        """
        called, clean = self.flow.calls, self._clean
        idle = [path for path, m in self._layers() if path not in called and (is_mixing(m) or is_depthwise(m))]
        missing: set[str] = set()
        for attempt in range(_TRAINING_RUNS if idle else 0):
            self.flow.calls, self._clean = {}, {}
            try:
                with torch.random.fork_rng(devices=[]), torch.no_grad(), hooked(self._watch_calls()):
                    torch.manual_seed(attempt)
                    with plain_eval(self.model, training_branches=True):
                        self._forward_clean()
            except StageError:
                # a model that does not run this way cannot be trained this way either
                break
            more, missing = self.flow.calls.keys() - called.keys(), called.keys() - self.flow.calls.keys()
            if not more:
                break
            if not missing:
                return frozenset(more)
            idle = sorted(more)
        self.flow.calls, self._clean = called, clean
        if missing:
            raise StageError(
                f"the model runs {idle[0]!r} in training only, and leaves {min(missing)!r} out there, so what is "
                "removed from one cannot be followed to the other: build it without the branch for training, or turn "
                "it into its inference form first"
            )
        return frozenset()

    @contextmanager
    def _replayed(self) -> Iterator[None]:
        """Linear layers and convolutions give what they gave in the clean pass, which is most of a pass's time.

        Their inputs are cleaned before and their outputs marked after, so nothing else could come out of them.
        """
        replaced = [module for _, module in self._layers() if module in self._clean and "forward" not in vars(module)]
        for module in replaced:
            setattr(module, "forward", self._replay(module))  # noqa: B010 - a method, as far as mypy knows
        try:
            yield
        finally:
            for module in replaced:
                del vars(module)["forward"]

    def _replay(self, module: Any) -> Callable[..., Tensor]:
        compute = module.forward

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            call = self._calls.get(module, 0)
            self._calls[module] = call + 1
            # a forward with loops of its own may call it more often than the first time
            known = call < len(self._clean[module])
            output: Tensor = self._clean[module][call].clone() if known else compute(*args, **kwargs)
            return output

        return forward

    def _forward_clean(self) -> None:
        """Runs the model without marks, and notes what it decides by its values."""
        sources = itertools.chain(self.inputs, (tensor for _, tensor in plain_tensors(self.model, self.flow)))
        self._forward(self._decisions.recorded(sources))
        self.flow.foreign |= self._decisions.foreign

    def _forward(self, watch: AbstractContextManager[Any]) -> bool:
        """Runs the model inside `watch`; whether NaN came out."""
        try:
            with watch:
                output = self.model(*self.inputs)
        except Exception as error:  # a user's forward may raise anything
            shapes = [tuple(x.shape) for x in self.inputs]
            raise StageError(
                f"the model's forward failed on inputs of shapes {shapes} while its channels were followed: "
                f"{type(error).__name__}: {error}; it must take the task's inputs positionally and run on one row"
            ) from error
        columns = self.columns or Columns()
        answer = columns.of(output)
        most = 2 if self.columns is None else math.inf
        if answer is not None and answer.is_floating_point() and 2 <= answer.dim() <= most:
            across = answer.movedim(columns.axis, 0)
            self.flow.widths[OUTPUT] = len(across)
            self._seen[OUTPUT] = torch.isnan(across).flatten(1).any(dim=1)
        return any(
            bool(torch.isnan(t).any()) for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()
        )

    def _layers(self) -> Iterator[tuple[str, nn.Module]]:
        for path, module in self.model.named_modules():
            if (
                path not in self.flow.opaque
                and not self.flow.care.shuts(path)
                and (is_mixing(module) or is_following(module))
            ):
                yield path, module

    def _watch_calls(self) -> Iterator[torch.utils.hooks.RemovableHandle]:
        for path, module in self._layers():
            if not is_following(module) or is_depthwise(module):
                yield module.register_forward_pre_hook(self._decisions.begin_aside)
                yield module.register_forward_hook(self._decisions.end_aside)
            yield module.register_forward_hook(self._note_call(path), with_kwargs=True)

    def _note_call(self, path: str) -> Callable[..., None]:
        rows = len(self.inputs[0]) if self.inputs else 1

        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            x = args[0] if args else kwargs.get("input")
            if not isinstance(x, Tensor) or not isinstance(output, Tensor):
                self.flow.opaque.add(path)
                return
            if has_own_forward(module):
                self._given.setdefault(path, (args, kwargs))
            read = width(module, "in" if is_mixing(module) or is_depthwise(module) else "out")
            made = width(module, "out")
            if x.shape[channel_dim(module, x)] != read or output.shape[channel_dim(module, output)] != made:
                self.flow.opaque.add(path)
            elif is_mixing(module) or is_depthwise(module):
                positions = output.numel() // made // rows
                # a transposed convolution multiplies at every input position
                places = x.numel() // read // rows if getattr(module, "transposed", False) else positions
                old = self.flow.calls.get(path, Call(0, 0))
                macs = old.macs + module.weight.numel() * places
                self.flow.calls[path] = Call(macs, max(old.positions, positions), getattr(module, "groups", 1) == 1)
                self._clean.setdefault(module, []).append(output.clone())

        return hook

    def _watch_channels(self) -> Iterator[torch.utils.hooks.RemovableHandle]:
        for path in self.flow.care.closed:
            closed = self.model.get_submodule(path)
            yield closed.register_forward_pre_hook(self._keep_out(path), with_kwargs=True)
            yield closed.register_forward_hook(self._mark_all(path))
        for path, module in self._layers():
            side: Side = "in" if is_mixing(module) or is_depthwise(module) else "out"
            yield module.register_forward_pre_hook(self._receive((path, side)), with_kwargs=True)
            yield module.register_forward_hook(self._send(path))
            self.flow.widths[(path, side)] = width(module, side)

    def _keep_out(self, path: str) -> Callable[..., Any]:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> Any:
            with self._decisions.aside():
                if any(is_marked(value) for value in tree_leaves((args, kwargs))):
                    self._stopped = path
                return tree_map(cleaned, args), tree_map(cleaned, kwargs)

        return hook

    def _mark_all(self, path: str) -> Callable[..., Any]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            with self._decisions.aside():
                return tree_map(marked_if_float, output) if self._stopped == path else output

        return hook

    def _receive(self, axis: Axis) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            with self._decisions.aside():
                return receive(module, args, kwargs)

        def receive(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            x: Tensor = args[0] if args else kwargs["input"]
            dim = channel_dim(module, x)
            there = torch.isnan(x).transpose(0, dim).flatten(1).any(dim=1) if x.dim() > 1 else torch.isnan(x)
            self._seen[axis] = self._seen[axis] | there if axis in self._seen else there
            self._arrived[module] = there
            clean = torch.nan_to_num(x) if bool(there.any()) else x
            return ((clean, *args[1:]), kwargs) if args else (args, {**kwargs, "input": clean})

        return hook

    def _send(self, path: str) -> Callable[..., Any]:
        def hook(module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            with self._decisions.aside():
                return send(module, output)

        def send(module: nn.Module, output: Tensor) -> Tensor:
            if is_mixing(module):
                mark = self._marks.get((path, "out"))
            else:
                there = self._arrived[module]
                mark = there.repeat_interleave(width(module, "out") // len(there)) if bool(there.any()) else None
            if mark is None:
                return output
            shape = [1] * output.dim()
            shape[channel_dim(module, output)] = -1
            return output.masked_fill(mark.view(shape), float("nan"))

        return hook

    def _run(self, marks: Marks) -> tuple[dict[Axis, Tensor], bool]:
        """Reached channels bool [channels] per reader axis, and whether NaN came out of the model."""
        self._marks, self._seen, self._calls, self._stopped = marks, {}, {}, None
        owners = dict(plain_tensors(self.model, self.flow))
        states = BufferStates(self.model) if self._states is None else self._states
        self._states = states
        saved = {name: owners[name].detach().clone() for name, _ in marks if name in owners}
        try:
            for (name, dim), mark in marks.items():
                if name in saved:
                    owners[name].index_fill_(int(dim), mark.nonzero().flatten(), float("nan"))
            came_out = self._forward(self._decisions.kept())
        finally:
            for name, value in saved.items():
                owners[name].copy_(value)
            # a buffer that the code updates would keep the marks
            states.restore()
        return {axis: there for axis, there in self._seen.items() if bool(there.any())}, came_out

    def _reach(self) -> dict[Axis, dict[Axis, Tensor]]:
        """Per source: the reader channels it arrives at, whatever source channel feeds them."""
        reach: dict[Axis, dict[Axis, Tensor]] = {}
        for path, module in self._layers():
            if is_mixing(module) and path in self.flow.calls:
                axis: Axis = (path, "out")
                self.flow.widths[axis] = width(module, "out")
                reach[axis], came_out = self._run({axis: torch.ones(self.flow.widths[axis], dtype=torch.bool)})
                if came_out:
                    self.flow.outputs.add(axis)
                if stopped := self._stopped or self._decisions.stopped:
                    self.flow.stuck[axis] = (
                        f"it reaches {stopped}, compiled code of another library that ends the process when its "
                        "channels are followed or fewer; it was left alone"
                    )
                if self._decisions.lost:
                    operation, place = next(iter(self._decisions.lost.items()))
                    self.flow.decides[axis] = (
                        f"its values become places or choices ({operation} in {place or 'the model'!r}), through which "
                        "no channel can be followed"
                    )
            elif is_depthwise(module):
                self.flow.widths[(path, "out")] = width(module, "out")
        layers = dict(reach)
        for name, tensor in plain_tensors(self.model, self.flow):
            whole = (name, str(tensor.dim() - 1))
            there, came_out = self._run({whole: torch.ones(tensor.shape[-1], dtype=torch.bool)})
            if came_out or not there:
                continue
            # channels, or units such as heads: as many as a reader has, or a layer that arrives at the same places, or
            # a divisor of that
            beside = {self.flow.widths[reader] for reader in there}
            for axis, reached in layers.items():
                if any(bool((reached[r] & mark).any()) for r, mark in there.items() if r in reached):
                    beside.add(self.flow.widths[axis])
            for dim, size in enumerate(tensor.shape):
                if size > 1 and any(many % size == 0 for many in beside):
                    self.flow.widths[(name, str(dim))] = size
                    reach[(name, str(dim))] = there
        return reach

    def _decode(self, reach: dict[Axis, dict[Axis, Tensor]]) -> None:
        """Finds the source channel of every reader channel; sources that disturb each other are run apart."""
        waiting = [axis for axis, there in reach.items() if there]
        found = self._numbers(waiting)
        disturbed = []
        for axis in waiting:
            if any(bool(((found[reader] == _MANY) & there).any()) for reader, there in reach[axis].items()):
                disturbed.append(axis)
            else:
                self._accept(axis, reach[axis], found)
        for together in _apart(disturbed, reach):
            found = self._numbers(together, reach)
            for axis in together:
                self._accept(axis, reach[axis], found)
        drop_single_rows(self.flow)
        # a plain tensor's dimension that cannot be told apart counts something else, tokens for example
        for axis in [a for a in self.flow.mixed if a[1] not in ("in", "out")]:
            for table in (self.flow.mixed, self.flow.mixed_at, self.flow.feeds, self.flow.widths):
                del table[axis]

    def _numbers(self, sources: list[Axis], reach: Mapping[Axis, Any] | None = None) -> dict[Axis, Tensor]:
        """Source channel int64 [channels] per reader axis: `_MANY` for several; meaningful where a source arrives.

        With `reach`, sources that turn out to be mixed are dropped from the later passes, which saves most of the time.
        """
        found: dict[Axis, Tensor] = {}
        alive = list(sources)
        for bit in range(max((self.flow.widths[a] - 1).bit_length() for a in sources) if sources else 0):
            if not alive:
                break
            numbers = {a: (torch.arange(self.flow.widths[a]) >> bit) & 1 for a in alive}
            ones, _ = self._run({a: n == 1 for a, n in numbers.items()})
            zeros, _ = self._run({a: n == 0 for a, n in numbers.items()})
            for axis in ones.keys() | zeros.keys():
                nothing = torch.zeros(self.flow.widths[axis], dtype=torch.bool)
                one, zero = ones.get(axis, nothing), zeros.get(axis, nothing)
                value = found.setdefault(axis, torch.zeros(len(one), dtype=torch.int64))
                found[axis] = torch.where(one & zero | (value == _MANY), _MANY, value + (one.to(torch.int64) << bit))
            if reach is not None:
                alive = [
                    a
                    for a in alive
                    if not any(bool((found.get(r, t.long())[t] == _MANY).any()) for r, t in reach[a].items())
                ]
        return found

    def _accept(self, axis: Axis, there: Mapping[Axis, Tensor], found: Mapping[Axis, Tensor]) -> None:
        feeds: dict[Axis, Tensor] = {}
        for reader, reached in there.items():
            number = found.get(reader, torch.zeros(self.flow.widths[reader], dtype=torch.int64))
            feeds[reader] = torch.where(reached, number, _MANY)
            several = reached & (number == _MANY)
            if bool(several.any()):
                self.flow.mixed.setdefault(axis, reader[0])
                self.flow.mixed_at.setdefault(axis, {})[reader] = several
        self.flow.feeds[axis] = feeds

    def _find_blocks(self, reach: Mapping[Axis, Mapping[Axis, Tensor]]) -> None:
        """Looks whether mixed sources are mixed in blocks of neighbours only, as attention heads are.

        However the channels are cut into blocks, joining a block with all that it reaches couples too much at worst.
        """
        sizes = {axis: size for axis in self.flow.mixed if (size := self._block_size(axis))}
        for together in _apart(list(sizes), reach):
            for number in range(max(self.flow.widths[axis] // sizes[axis] for axis in together)):
                marks = {}
                for axis in together:
                    mark = torch.zeros(self.flow.widths[axis], dtype=torch.bool)
                    mark[number * sizes[axis] : (number + 1) * sizes[axis]] = True
                    if bool(mark.any()):
                        marks[axis] = mark
                seen, _ = self._run(marks)
                for axis, mark in marks.items():
                    arrived = {reader: seen[reader] for reader in reach[axis] if reader in seen}
                    self.flow.blocks.setdefault(axis, []).append((mark, arrived))
        for axis in sizes:
            del self.flow.mixed[axis], self.flow.mixed_at[axis]

    def _block_size(self, axis: Axis) -> int:
        """How many of the first channels reach exactly what the first one reaches; 0 if those after them reach it too.

        A key that several query heads share reaches more channels than its own head has, so these are not counted.
        """
        whole = self.flow.widths[axis]

        def reached(start: int, stop: int) -> dict[Axis, Tensor]:
            mark = torch.zeros(whole, dtype=torch.bool)
            mark[start:stop] = True
            return self._run({axis: mark})[0]

        first = reached(0, 1)
        size = 1
        for longer in (n for n in range(2, whole + 1) if whole % n == 0):
            there = reached(0, longer)
            if there.keys() != first.keys() or not all(torch.equal(there[r], first[r]) for r in first):
                break
            size = longer
        if size == whole:
            return 0
        after = reached(size, 2 * size)
        return 0 if any(bool((after[r] & first[r]).any()) for r in after.keys() & first.keys()) else size


def _apart(sources: list[Axis], reach: Mapping[Axis, Mapping[Axis, Tensor]]) -> list[list[Axis]]:
    """Groups of sources that arrive at no common reader."""
    rounds: list[tuple[list[Axis], set[Axis]]] = []
    for axis in sources:
        readers = set(reach[axis])
        for members, taken in rounds:
            if not taken & readers:
                members.append(axis)
                taken |= readers
                break
        else:
            rounds.append(([axis], set(readers)))
    return [members for members, _ in rounds]


def trace(model: nn.Module, inputs: tuple[Tensor, ...], care: Care, columns: Columns | None = None) -> Flow:
    """Follows the channels of every layer of `model`; the model is unchanged afterwards.

    Args:
        model: called positionally with `inputs`, in eval mode.
        inputs: one row.
        care: see `apart.looked_into`.
        columns: of the answer that are followed; None: those of one tensor [N, columns].

    Raises:
        StageError: the model does not run on them.
        ForeignCodeError: it runs code of other libraries, and is not apart.
    """
    return Tracer(model, inputs, care, columns).trace()
