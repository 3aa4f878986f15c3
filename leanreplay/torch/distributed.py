"""Several processes under torchrun: each feeds and samples its own buffer, gradients meet in DistributedDataParallel.

What is shared is little: weights and their gradients. Buffers stay apart (`stream=rank`) until `leanreplay.merge` makes one exact buffer of
all. Everything here is the identity in a single process.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ..buffers.base import DataBuffer
from ..errors import ArgumentError
from .nests import leaves


def rank_and_size() -> tuple[int, int]:
    """The number of this process, and of processes. Raises ArgumentError under torchrun if there is no process group yet."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    if dist.is_available() and dist.is_torchelastic_launched():
        raise ArgumentError("started by torchrun, but there is no process group yet: call torch.distributed.init_process_group() first")
    return 0, 1


def gather(value: Any) -> list[Any]:
    """Everyone's value, in the order of ranks. All must call it."""
    if rank_and_size()[1] == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The model within a DistributedDataParallel; any other as it is."""
    # isinstance would ask an abstract base class, which costs microseconds.
    return model.module if DistributedDataParallel in type(model).__mro__ else model  # type: ignore[return-value]


def innermost(model: torch.nn.Module) -> torch.nn.Module:
    """The model within a DistributedDataParallel and torch.compile: the one whose layers have the names that its author gave them."""
    while True:
        inner = model._modules.get("_orig_mod") or unwrapped(model)
        if inner is model:
            return model
        model = inner


def layer_of(model: torch.nn.Module, name: str) -> torch.nn.Module | None:
    """A layer by its name in the innermost model, or in one of those around it; None if there is none."""
    inner = innermost(model)
    while True:
        try:
            return inner.get_submodule(name)
        except AttributeError:
            prefix = next((p for p in ("_orig_mod.", "module.") if name.startswith(p)), None)
            if prefix is None:
                return None
            name = name.removeprefix(prefix)


def uncompiled(model: torch.nn.Module) -> Any:
    """What runs a compiled model as it was before: hooks of its layers do not fire in compiled code. Any other as it is."""
    model = model._modules.get("_orig_mod") or model
    return model if getattr(model, "_compiled_call_impl", None) is None else model._call_impl


def check_reach(model: torch.nn.Module, outputs: Any, total: torch.Tensor, first: bool) -> None:
    """Raise ArgumentError for a loss whose gradients a DistributedDataParallel could not exchange.

    outputs: of the pass through it; total: the loss, with other passes through the module in it. first: whether this is the first
    loss of a task. Costs a walk through the graph: at each step only where the wrapper does that too.
    """
    if not isinstance(model, DistributedDataParallel) or not total.requires_grad or getattr(model, "static_graph", False):
        return
    find = model.find_unused_parameters
    if not find and not first:
        return
    trained = {p: name for name, p in model.module.named_parameters() if p.requires_grad}
    reached = _reached(total)
    if reached is None:
        return
    if not find:
        missing = [name for p, name in trained.items() if p not in reached]
        if missing:
            raise ArgumentError(
                f"this loss does not reach {len(missing)} parameters ({', '.join(missing[:5])}), for whose gradients a "
                "DistributedDataParallel would wait: wrap the model with find_unused_parameters=True (fit keeps a wrapper that is there), "
                "or freeze them with requires_grad_(False)"
            )
        return
    through = _reached(*leaves(outputs)) or set()
    others = [name for p, name in trained.items() if p in reached and p not in through]
    if others:
        raise ArgumentError(
            f"replayed samples reach {len(others)} parameters that the batch from the stream does not ({', '.join(others[:5])}), and which "
            "a DistributedDataParallel therefore leaves out: let every pass compute all heads, and choose among their outputs, or use a "
            "method with one pass for both, such as ERLearner"
        )


def _reached(*tensors: torch.Tensor) -> set[torch.Tensor] | None:
    """The leaves that a backward pass reaches; None where the graph does not tell."""
    found: set[torch.Tensor] = set()
    seen, todo = set(), [tensor.grad_fn for tensor in tensors]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if "CheckpointFunction" in node.name():  # makes its graph only during the backward pass
            return None
        if (leaf := getattr(node, "variable", None)) is not None:
            found.add(leaf)
        todo.extend(following for following, _ in node.next_functions)
    return found


@contextlib.contextmanager
def parallel(learner: Any) -> Iterator[None]:
    """The learner's model in a DistributedDataParallel, for a while. One that is in one already stays as it is."""
    model = learner.model
    if rank_and_size()[1] > 1 and model is unwrapped(model):
        device = next(model.parameters()).device
        learner.model = DistributedDataParallel(model, device_ids=None if device.type == "cpu" else [device])
    try:
        yield
    finally:
        learner.model = model


def share_statistics(model: torch.nn.Module) -> None:
    """Give all ranks rank 0's buffers of the model, batch norm's running statistics for instance."""
    if rank_and_size()[1] > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def check_ranks(model: torch.nn.Module, buffer: DataBuffer) -> None:
    """Raise ArgumentError unless all ranks begin with the same weights, and with buffers that can be merged in the end."""
    if rank_and_size()[1] == 1:
        return
    digest = hashlib.blake2b()
    for parameter in model.parameters():
        digest.update(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    seeds, streams, digests = zip(*gather((buffer.seed, buffer.stream, digest.digest())), strict=True)
    if len(set(seeds)) > 1 or len(set(streams)) < len(streams):
        raise ArgumentError(
            f"the buffers of the ranks have seeds {list(seeds)} and streams {list(streams)}, and could not be merged; give all the same "
            "seed, and each a stream of its own: stream=torch.distributed.get_rank()"
        )
    if len(set(digests)) > 1:
        raise ArgumentError("the ranks begin with different weights; call torch.manual_seed with the same number before making the model")
