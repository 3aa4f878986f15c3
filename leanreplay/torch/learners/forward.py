"""Passes through a model: of any batch, of a draw, and how to undo their running statistics."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.modules import batchnorm
from torch.nn.parameter import is_lazy

from ...errors import ArgumentError
from .. import nests
from ..data import to_torch
from ..distributed import innermost, layer_of, uncompiled, unwrapped
from ..models import ForwardFunction, run_model


class Forward(NamedTuple):
    """One pass through the model.

    outputs: (n, ...), a tensor or a nest of tensors. features: by name, the outputs of the layers
    that terms asked for, (n, ...).
    """

    outputs: Any
    features: dict[str, Tensor]

    def part(self, start: int, n: int) -> Forward:
        """n of the samples, from `start` on."""
        features = {name: f.narrow(0, start, n) for name, f in self.features.items()}
        return Forward(nests.part(self.outputs, start, n), features)

    def detached(self) -> Forward:
        """The same values without a graph: further operations cost less."""
        return Forward(nests.each_leaf(Tensor.detach, self.outputs), {name: f.detach() for name, f in self.features.items()})


def forward(model: Module, x: Any, layers: Sequence[str] = (), function: ForwardFunction | None = None) -> Forward:
    """Pass x, a nest of tensors (n, ...), through the model, as `run_model` does.

    The hooks on `layers` are removed afterwards, whatever happens.
    """
    n = nests.first(x).shape[0]
    if n < 2:
        _refuse_batch_norm(model)
    features: dict[str, Tensor] = {}
    if not layers:
        outputs = run_model(model, x, function)
    else:
        handles = []
        try:
            for name in layers:
                layer: Any = layer_of(model, name)
                handles.append(layer.register_forward_hook(partial(_keep_output, features, name)))
            outputs = run_model(uncompiled(model), x, function)
        finally:
            for handle in handles:
                handle.remove()
    for name in layers:
        f = features.get(name)
        if f is None:
            raise ArgumentError(f"layer {name!r} did not run in this pass through the model; name one that always does")
        if f.ndim < 1 or f.shape[0] != n:
            raise ArgumentError(f"layer {name!r} gives shape {tuple(f.shape)} for {n} samples, expected ({n}, ...)")
    return Forward(outputs, features)


class Replay:
    """Samples drawn from the buffer: x (m, ...) and y (m, ...), transformed, on the model's device.

    x, y and `outputs` are tensors, or nests of them.
    Several terms may share a draw. `outputs` and `features` come from the draw's own pass through
    the model. The first term that asks for them starts that pass; terms that share the draw share
    the pass.
    metadata: what the buffer returned for these samples, NumPy arrays; see `stored`.
    """

    def __init__(
        self, module: Module, x: Any, y: Any, metadata: dict[str, Any], layers: Sequence[str],
        labels: Any = None, bits: frozenset[str] = frozenset(), function: ForwardFunction | None = None,
    ) -> None:  # fmt: skip
        """labels: y where reading it does not wait for a device. bits: names of bfloat16 fields.
        function: calls the model, see `run_model`."""
        self.x, self.y, self.metadata, self.layers = x, y, metadata, layers
        self.labels, self.bits = y if labels is None else labels, bits
        self.shared = False  # whether each pass gets a copy of x, because a model may work in place
        self.joint: Forward | None = None  # the pass of the stream's batch followed by this draw
        self._module, self._function = module, function
        self._own: Forward | None = None

    def __len__(self) -> int:
        return len(self.metadata["idx"])

    def stored(self, name: str) -> Tensor:
        """A copy of what was stored with these samples as `name`, (m, ...), on their device."""
        tensor: Tensor = to_torch(self.metadata[name], self.bits, path=f"metadata/{name}")
        return tensor.to(nests.first(self.x).device, copy=True)

    @property
    def together(self) -> Forward | None:
        """The draw's part of a pass together with the stream's batch; None if there was none."""
        return None if self.joint is None else self.joint.part(-len(self), len(self))

    @property
    def alone(self) -> Forward:
        """The draw's own pass through the model."""
        if self._own is None:
            x = nests.copied(self.x) if self.shared else self.x
            self._own = forward(self._module, x, tuple(dict.fromkeys(self.layers)), self._function)
        return self._own

    @property
    def outputs(self) -> Any:
        """The model's outputs in the draw's own pass."""
        return self.alone.outputs

    @property
    def features(self) -> dict[str, Tensor]:
        """The layers' outputs in the draw's own pass."""
        return self.alone.features

    @property
    def latest(self) -> Forward | None:
        """A pass of this step: the draw's own, else the joint one; None if there was none."""
        return self.together if self._own is None else self._own

    def forget(self) -> None:
        """Drop the passes: graphs must not live until a closure asks for this draw again."""
        self._own = self.joint = None


def _keep_output(features: dict[str, Tensor], name: str, _module: Module, _inputs: Any, output: Any) -> None:
    if name in features:
        raise ArgumentError(f"layer {name!r} runs several times for one batch; name a layer that runs once, say one around it")
    if not isinstance(output, Tensor):
        raise ArgumentError(f"layer {name!r} gives a {type(output).__name__}, expected a tensor; name a layer within or after it")
    features[name] = output.clone()  # the next layer may work in place, as ReLU(inplace=True) does


def _refuse_batch_norm(model: Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, batchnorm._BatchNorm) and module.training and not isinstance(module, torch.nn.SyncBatchNorm):
            raise ArgumentError(
                f"a batch of 1 sample, but {name or 'the model'} is a {type(module).__name__} in train mode, which needs at least 2; "
                "use drop_last=True in the DataLoader, a larger (replay) batch size, or put that layer into eval mode"
            )


class Statistics:
    """The running statistics of modules before a pass, to be put back if the pass fails.

    The copies are reused from step to step, so a copy is one call.
    """

    def __init__(self) -> None:
        self._now: list[Tensor] = []
        self._before: list[Tensor] = []

    def remember(self, modules: Iterable[Module]) -> None:
        """Copy the buffers that these modules have now."""
        found: list[Tensor] = []
        for module in modules:
            _collect_buffers(module, found)
        if not found and not self._now:
            return
        if len(found) == len(self._now) and all(map(operator.is_, found, self._now)):
            with torch.no_grad():
                torch._foreach_copy_(self._before, found)
        else:
            found = [b for b in found if not is_lazy(b)]
            self._now, self._before = found, [b.detach().clone() for b in found]

    def put_back(self) -> None:
        """Restore what `remember` copied."""
        with torch.no_grad():
            for now, before in zip(self._now, self._before, strict=True):
                now.copy_(before)


def _collect_buffers(module: Module, found: list[Tensor]) -> None:
    """Append what `buffers()` gives, several times as fast; a shared buffer may come twice."""
    if module._buffers:
        found += [b for b in module._buffers.values() if b is not None]
    if module._modules:
        for child in module._modules.values():
            if child is not None:
                _collect_buffers(child, found)


def check_initialized(model: Module, term: str) -> None:
    """Raise ArgumentError for a model with lazy layers that have no weights yet."""
    lazy = [name for name, value in [*model.named_parameters(), *model.named_buffers()] if is_lazy(value)]
    if lazy:
        raise ArgumentError(
            f"the term {term!r} needs the model's weights, but {lazy[0]} of {type(model).__name__} is lazy and has no shape yet: pass a "
            "batch through the model before, model(x)"
        )


def check_layers(model: Module, layers: Sequence[str]) -> None:
    """Raise ArgumentError unless these are names of layers."""
    inner = innermost(model)
    names = [name for name, _ in inner.named_modules(remove_duplicate=False) if name]
    first_names = ", ".join(names[:20]) + ", ..." * (len(names) > 20)
    if not layers:
        raise ArgumentError(f"layers: name at least one; {type(inner).__name__} has {first_names}")
    if unwrapped(model) is not model and uncompiled(unwrapped(model)) is not unwrapped(model):
        raise ArgumentError(
            "layers of a compiled model within a DistributedDataParallel cannot be looked at; put it around: "
            "torch.compile(DistributedDataParallel(model)), or do not compile it"
        )
    for layer in layers:
        if not layer or layer_of(model, layer) is None:
            near = difflib.get_close_matches(str(layer), names, 5, 0.4)
            hint = f"did you mean {', '.join(map(repr, near))}?" if near else f"it has: {first_names}"
            raise ArgumentError(f"{type(inner).__name__} has no layer {layer!r:.200}; {hint} (names are those of named_modules())")
