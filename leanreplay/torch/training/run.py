"""One run of `fit`: epochs of steps, validation, states."""

from __future__ import annotations

import contextlib
import copy
import importlib
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from .. import distributed
from ..nests import first
from .history import History
from .resume import Position, remember, resume, state_of
from .settings import Settings
from .validation import measured, validate


class Run:
    """One call of `fit`: what was asked for, and where the run is."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.learner = settings, settings.learner
        self.is_first_rank = settings.batches.rank == 0
        self.position = Position()
        self.history = History(settings.task_id, self.position.records, settings.watch.monitor, settings.watch.mode)

    def train(self) -> History:
        """Train from where the state to go on from ends; return the history of the whole task."""
        found = resume(self.settings)
        if found is not None:
            self.position = found
            self.history.records, self.history.stopped_early = found.records, found.stopped_early
        if self.position.finished:
            return self.history
        with _prepared(self.settings):
            if found is None:
                self.begin_task()
            self.save()  # else a kill could leave a buffer ahead of every state
            while self.position.epoch < self.settings.max_epochs and not self.has_waited():
                self.train_epoch()
                self.end_epoch()
                self.save()
            self.end_task()
        return self.history

    def begin_task(self) -> None:
        distributed.share_statistics(self.learner.module)
        self.learner.on_task_start(self.settings.task_id)
        if self.settings.output is not None and self.is_first_rank:
            self.settings.output.remove("best.pt")

    def train_epoch(self) -> None:
        """Train on what is left of this epoch."""
        s, at = self.settings, self.position
        self.learner.store = s.store == "every epoch" or (s.store == "first epoch" and at.epoch == 0)
        with _bar(s.progress and self.is_first_rank, f"epoch {at.epoch + 1}/{s.max_epochs}", at.step, s.batches.steps) as bar:
            for x, y in s.batches.of(at.epoch, at.step):
                with s.cast():
                    out = self.learner.step(x, y) if s.scaler is None else self.learner.step(x, y, s.scaler)
                n = first(y).shape[0]
                values = {"loss": out.loss, **{f"loss/{term}": value for term, value in out.losses.items()}}
                values |= measured("train_metrics", s.watch.train_metrics, out.outputs, out.targets)
                for name, value in values.items():
                    total, samples = at.sums.get(name, (0.0, 0))
                    at.sums[name] = [total + value * n, samples + n]
                if s.scheduler is not None and s.scheduler_interval == "step" and out.stepped:
                    s.scheduler.step()
                at.step += 1
                bar(out.loss)
                if s.save_every is not None and at.step % s.save_every == 0 and at.step < s.batches.steps:
                    self.save()

    def end_epoch(self) -> None:
        """Validate, record, and do what depends on the record."""
        s, at, history, model = self.settings, self.position, self.history, self.learner.evaluated_model
        lr = float(self.learner.optimizer.param_groups[0].get("lr", math.nan))
        record = {"epoch": at.epoch, "lr": lr, **_means(at.sums)}
        for module in dict.fromkeys((self.learner.module, model)):
            distributed.share_statistics(module)
        if s.validation is not None:
            record |= validate(self.learner, s.validation.readers(), s.watch.metrics, s.batch_size, s.device, s.cast)
        history.records.append(record)
        if s.scheduler is not None and s.scheduler_interval == "epoch":
            s.scheduler.step(*([record[history.monitor]] if s.has_plateau and history.monitor else []))
        if s.logger is not None and self.is_first_rank:
            s.logger({"task_id": s.task_id, **record})
        if history.best_epoch == at.epoch:
            if s.output is not None and self.is_first_rank:
                s.output.write("best.pt", model.state_dict())
            if s.watch.restore_best:
                at.best = copy.deepcopy(model.state_dict())
        at.epoch, at.step, at.sums = at.epoch + 1, 0, {}

    def end_task(self) -> None:
        self.history.stopped_early = self.position.stopped_early = self.position.epoch < self.settings.max_epochs
        if self.position.best:
            self.learner.evaluated_model.load_state_dict(self.position.best)
            self.position.best = {}
        self.learner.on_task_end()
        if self.settings.validation is not None:
            self.settings.validation.remember_task()
        self.position.finished = True
        self.save()

    def has_waited(self) -> bool:
        """Whether so many epochs as `patience` says have passed without a better metric."""
        patience, best = self.settings.watch.patience, self.history.best_epoch
        return patience is not None and len(self.history) - 1 - (-1 if best is None else best) >= patience

    def save(self) -> None:
        """Write a state, if states are asked for."""
        output, buffers = self.settings.output, self.settings.buffers
        if output is None:
            return
        with warnings.catch_warnings():
            if self.settings.save_buffer:  # then its samples are kept too
                warnings.filterwarnings("ignore", "the state of a buffer in memory")
            state = state_of(self.settings, self.position)
        copied = {name: buffer for name, buffer in buffers.items() if len(buffer)} if self.settings.save_buffer else {}
        remember(self.learner, output, output.save(state, copied))


@contextlib.contextmanager
def _prepared(settings: Settings) -> Iterator[None]:
    """Set learner and torch as `fit` needs them; afterwards put them back as they were."""
    learner: Any = settings.learner
    cudnn, modes = torch.backends.cudnn, [(m, m.training) for m in learner.module.modules()]
    before, store = (learner.replay_batch_size, learner.device, cudnn.benchmark), learner.store
    was, warn_only = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    handle = None if settings.clip is None else learner.optimizer.register_step_pre_hook(settings.clip)
    try:
        learner.replay_batch_size, learner.device = settings.replayed, settings.device
        if not learner.module.training:  # else a single layer in eval mode is there on purpose
            learner.module.train()
        if settings.deterministic:
            cudnn.benchmark = False
            torch.use_deterministic_algorithms(True)
        with distributed.parallel(learner):
            yield
    finally:
        learner.replay_batch_size, learner.device, cudnn.benchmark = before
        learner.store = store
        torch.use_deterministic_algorithms(was, warn_only=warn_only)
        for module, mode in modes:
            module.training = mode
        if handle is not None:
            handle.remove()


def _means(sums: dict[str, list[float]]) -> dict[str, float]:
    """Means over the samples of all ranks."""
    parts = distributed.gather(sums)
    names = dict.fromkeys(name for part in parts for name in part)
    total = {name: np.sum([part[name] for part in parts if name in part], axis=0) for name in names}
    return {name: float(value / samples) for name, (value, samples) in total.items()}


@contextlib.contextmanager
def _bar(show: bool, title: str, done: int, steps: int) -> Iterator[Callable[[float], None]]:
    """Show a progress bar; yield what is called with the loss after each step."""
    tqdm = None
    if show:
        with contextlib.suppress(ImportError):  # an extra: not needed, and not missed
            tqdm = importlib.import_module("tqdm").tqdm
    if tqdm is None:
        yield lambda loss: None
        return
    with tqdm(initial=done, total=steps, desc=title, unit="step", file=sys.stderr) as bar:

        def advance(loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.4g}", refresh=False)
            bar.update()

        yield advance
