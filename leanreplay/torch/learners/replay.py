"""What passes between learners and their terms: a forward pass, and a replay draw with what the model makes of it."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from ...errors import ArgumentError
from ..data import to_torch
from ..distributed import innermost, layer_of, uncompiled, unwrapped

if TYPE_CHECKING:
    from .term import Term


class Forward(NamedTuple):
    """One pass through the model. outputs: (n, ...). features: by name, what the layers that terms asked for gave, (n, ...) each."""

    outputs: torch.Tensor
    features: dict[str, torch.Tensor]

    def part(self, start: int, n: int, detached: bool = False) -> Forward:
        """n of the samples; detached: only to be looked at, which costs less."""
        outputs = self.outputs.detach() if detached else self.outputs
        features = {name: (f.detach() if detached else f).narrow(0, start, n) for name, f in self.features.items()}
        return Forward(outputs.narrow(0, start, n), features)


class Replay:
    """Samples drawn from the buffer: x (m, ...) and y (m, ...) on the model's device, transformed; terms may share one draw.

    `outputs` and `features` are of the draw's own pass through the model, which the first term that asks for them sets off: terms
    that share a draw share that pass. metadata: the buffer's for these samples, NumPy arrays; see `stored`. Each pass gets a copy of x if
    the draw is `shared`, as a model may work in place.
    """

    def __init__(self, module: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, metadata: dict[str, Any], layers: Sequence[str]) -> None:
        self.x, self.y, self.metadata, self.layers = x, y, metadata, layers
        self.labels = y  # the targets, where they can be looked at without waiting for a device
        self.bits: frozenset[str] = frozenset()  # names of fields that hold bfloat16
        self._module = module
        self.shared = False
        self._alone: Forward | None = None
        self._both: Forward | None = None

    def __len__(self) -> int:
        return len(self.metadata["idx"])

    def behind(self, inputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The stream's batch and the draw, one after the other."""
        return torch.cat([inputs, self.x]), torch.cat([targets, self.y])

    def stored(self, name: str) -> torch.Tensor:
        """What was stored with these samples under this name, (m, ...), on their device: a copy."""
        tensor: torch.Tensor = to_torch(self.metadata[name], self.bits, path=f"metadata/{name}")
        return tensor.to(self.x.device, copy=True)

    def joined(self, both: Forward) -> None:
        """Tell it of a pass that it made together with the stream, which came first."""
        self._both = both

    @property
    def together(self) -> Forward | None:
        """Its part of the pass that it made together with the stream, if there was one."""
        return None if self._both is None else self._both.part(-len(self), len(self))

    @property
    def alone(self) -> Forward:
        """The draw's own pass through the model."""
        if self._alone is None:
            self._alone = forward(self._module, self.x.clone() if self.shared else self.x, tuple(dict.fromkeys(self.layers)))
        return self._alone

    @property
    def outputs(self) -> torch.Tensor:
        """The model's outputs now, in the draw's own pass."""
        return self.alone.outputs

    @property
    def features(self) -> dict[str, torch.Tensor]:
        """What the layers give now, in the draw's own pass."""
        return self.alone.features

    def forget(self) -> None:
        """Forget its passes: the same draw may be asked for once more, and graphs must not live until then."""
        self._alone = self._both = None

    @property
    def latest(self) -> Forward | None:
        """Some pass of this step through the model: its own one if there was one."""
        return self.together if self._alone is None else self._alone


def forward(model: torch.nn.Module, x: torch.Tensor, layers: Sequence[str] = ()) -> Forward:
    """Pass x through the model, and take what these layers give on the way. Hooks live for this one pass, whatever happens."""
    if x.shape[0] < 2:
        _refuse_batch_norm(model)
    features: dict[str, torch.Tensor] = {}
    if not layers:
        outputs = model(x)
    else:
        handles = []
        try:
            for name in layers:
                layer: Any = layer_of(model, name)
                handles.append(layer.register_forward_hook(partial(_take, features, name)))
            outputs = uncompiled(model)(x)
        finally:
            for handle in handles:
                handle.remove()
    if not isinstance(outputs, torch.Tensor):
        raise ArgumentError(
            f"the model must return a tensor of outputs (n, ...), got {type(outputs).__name__}; wrap it in a module that does"
        )
    for name in layers:
        f = features.get(name)
        if f is None:
            raise ArgumentError(f"layer {name!r} did not run in this pass through the model; name one that always does")
        if f.ndim < 1 or f.shape[0] != x.shape[0]:
            raise ArgumentError(f"layer {name!r} gives shape {tuple(f.shape)} for {x.shape[0]} samples, expected ({x.shape[0]}, ...)")
    return Forward(outputs, features)


def _take(features: dict[str, torch.Tensor], name: str, _module: torch.nn.Module, _inputs: Any, output: Any) -> None:
    if name in features:
        raise ArgumentError(f"layer {name!r} runs several times for one batch; name a layer that runs once, say one around it")
    if not isinstance(output, torch.Tensor):
        raise ArgumentError(f"layer {name!r} gives a {type(output).__name__}, expected a tensor; name a layer within or after it")
    features[name] = output.clone()  # the next layer may work in place, as ReLU(inplace=True) does


def _refuse_batch_norm(model: torch.nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.training and not isinstance(module, torch.nn.SyncBatchNorm):
            raise ArgumentError(
                f"a batch of 1 sample, but {name or 'the model'} is a {type(module).__name__} in train mode, which needs at least 2; "
                "use drop_last=True in the DataLoader, a larger (replay) batch size, or put that layer into eval mode"
            )


def running_statistics(module: torch.nn.Module, found: list[torch.Tensor]) -> list[torch.Tensor]:
    """All buffers of a module: what `buffers()` gives, several times as fast, some perhaps twice."""
    if module._buffers:
        found += [b for b in module._buffers.values() if b is not None]
    if module._modules:
        for child in module._modules.values():
            if child is not None:
                running_statistics(child, found)
    return found


class Statistics:
    """Running statistics as they were before a pass, to be put back if it fails. Its memory is used again: a copy is one call."""

    def __init__(self) -> None:
        self._now: list[torch.Tensor] = []
        self._before: list[torch.Tensor] = []

    def remember(self, model: torch.nn.Module, terms: Sequence[Term]) -> None:
        """Take a copy of what the model, and the modules of these terms, have now."""
        found = running_statistics(model, [])
        for term in terms:
            for module in term.modules():
                running_statistics(module, found)
        if not found and not self._now:
            return
        if len(found) == len(self._now) and all(map(operator.is_, found, self._now)):
            with torch.no_grad():
                torch._foreach_copy_(self._before, found)
        else:
            found = [b for b in found if not is_lazy(b)]
            self._now, self._before = found, [b.detach().clone() for b in found]

    def put_back(self) -> None:
        """As they were when `remember` was called."""
        with torch.no_grad():
            for now, before in zip(self._now, self._before, strict=True):
                now.copy_(before)


def check_initialized(model: torch.nn.Module, term: str) -> None:
    """Raise ArgumentError for a model with lazy layers that have no weights yet."""
    lazy = [name for name, value in [*model.named_parameters(), *model.named_buffers()] if is_lazy(value)]
    if lazy:
        raise ArgumentError(
            f"the term {term!r} needs the model's weights, but {lazy[0]} of {type(model).__name__} is lazy and has no shape yet: pass a "
            "batch through the model before, model(x)"
        )


def check_layers(model: torch.nn.Module, layers: Sequence[str]) -> None:
    """Raise ArgumentError unless these are names of layers."""
    inner = innermost(model)
    names = [name for name, _ in inner.named_modules(remove_duplicate=False) if name]
    if not layers:
        raise ArgumentError(f"layers: name at least one; {type(inner).__name__} has {', '.join(names[:20])}" + ", ..." * (len(names) > 20))
    if unwrapped(model) is not model and uncompiled(unwrapped(model)) is not unwrapped(model):
        raise ArgumentError(
            "layers of a compiled model within a DistributedDataParallel cannot be looked at; put it around: "
            "torch.compile(DistributedDataParallel(model)), or do not compile it"
        )
    for layer in layers:
        if not layer or layer_of(model, layer) is None:
            near = difflib.get_close_matches(str(layer), names, 5, 0.4)
            shown = (
                f"did you mean {', '.join(map(repr, near))}?" if near else f"it has: {', '.join(names[:20])}" + ", ..." * (len(names) > 20)
            )
            raise ArgumentError(f"{type(inner).__name__} has no layer {layer!r:.200}; {shown} (names are those of named_modules())")
