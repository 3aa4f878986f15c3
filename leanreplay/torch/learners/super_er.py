"""Super experience replay: the terms of DER++, CLS-ER and POD together, and shrink and perturb."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.nn import Module
from torch.optim import Optimizer

from ...buffers.base import DataBuffer
from .learner import ReplayLearner
from .terms import Consistency, LogitMatching, PooledOutputDistillation, ReplayLoss, ShrinkAndPerturb


class SuperERLearner(ReplayLearner):
    """DER++, CLS-ER and POD in one loss, and shrink and perturb.

        L = l(f(x), y) + der_alpha * |f(x1) - z1|^2 + der_beta * l(f(x2), y2)
            + cls_alpha * |f(x2) - Z2|^2 + pod_alpha * POD(x3)

    (x1, z1), (x2, y2) and x3 are three draws from the buffer. z1 are the logits stored with x1, Z2
    those of the stable or plastic copy for x2: see `LogitMatching`, `Consistency` and
    `PooledOutputDistillation`, and `DERLearner`, `CLSLearner` and `PODLearner` for the papers. At
    the start of a task the model is shrunk and perturbed: see `ShrinkAndPerturb`, and call
    `on_task_start`. The stream and each draw have one pass through the model, so batch norm sees
    four batches; the consistency takes the second draw's pass.

    pod_layers: names of layers; not needed with pod_alpha=0, which leaves that term out. By default
    the loss is divided by the sum of the weights. Other parameters: see the terms and
    `ReplayLearner`.

    >>> import torch
    >>> from leanreplay import ReservoirBuffer
    >>> from leanreplay.torch import SuperERLearner
    >>> conv, flatten = torch.nn.Conv2d(1, 4, 3), torch.nn.Flatten()
    >>> model = torch.nn.Sequential(conv, torch.nn.ReLU(), flatten, torch.nn.Linear(144, 2))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> learner = SuperERLearner(model, optimizer, ReservoirBuffer(50), pod_layers=["1"])
    >>> for task in range(2):
    ...     learner.on_task_start(task)
    ...     for start in range(0, 30, 10):
    ...         step = learner.step(torch.randn(10, 1, 8, 8), torch.arange(start, start + 10) % 2)
    >>> list(step.losses), learner.stable_model(torch.zeros(1, 1, 8, 8)).shape
    (['stream', 'logits', 'replay', 'consistency', 'pod'], torch.Size([1, 2]))
    """

    def __init__(
        self,
        model: Module,
        optimizer: Optimizer,
        buffer: DataBuffer,
        *,
        der_alpha: float = 1.0,
        der_beta: float = 1.0,
        sp_shrink_factor: float = 0.95,
        sp_sigma: float = 0.001,
        cls_alpha: float = 0.1,
        cls_stable_model_update_weight: float = 0.999,
        cls_plastic_model_update_weight: float = 0.999,
        cls_stable_model_update_probability: float = 0.7,
        cls_plastic_model_update_probability: float = 0.9,
        pod_alpha: float = 1.0,
        pod_distillation_type: str = "spatial",
        pod_normalize: bool = True,
        pod_layers: Sequence[str] = (),
        **options: Any,
    ) -> None:
        self._consistency = Consistency(
            cls_alpha,
            stable_model_update_weight=cls_stable_model_update_weight,
            plastic_model_update_weight=cls_plastic_model_update_weight,
            stable_model_update_probability=cls_stable_model_update_probability,
            plastic_model_update_probability=cls_plastic_model_update_probability,
        )
        terms = [LogitMatching(der_alpha), ReplayLoss(der_beta), self._consistency]
        if pod_alpha != 0 or pod_layers:
            terms.append(
                PooledOutputDistillation(pod_alpha, layers=pod_layers, distillation_type=pod_distillation_type, normalize=pod_normalize)
            )
        terms.append(ShrinkAndPerturb(sp_shrink_factor, sp_sigma))
        super().__init__(model, optimizer, buffer, terms=terms, **options)

    @property
    def stable_model(self) -> Module:
        """The slowest average of the model, in train mode."""
        return self._consistency.copies["stable"]

    @property
    def plastic_model(self) -> Module:
        """The faster average of the model."""
        return self._consistency.copies["plastic"]
