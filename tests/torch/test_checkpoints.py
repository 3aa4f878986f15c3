"""States in other people's checkpoints: torch.distributed.checkpoint, StatefulDataLoader, Accelerate.

torch.distributed.checkpoint reads the keys that the state of a fresh object has, and no others: so states have the same keys always.
"""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.utils.data import SequentialSampler

import leanreplay
from leanreplay import ClassBalancedBuffer, InfiniteBuffer, ReservoirBuffer
from leanreplay.torch import (
    BufferDataset,
    CLSLearner,
    DERLearner,
    ERLearner,
    InterleavedSampler,
    InterleavedSamplerConfig,
    ReplayLoader,
    SamplerIntervalConfig,
    ShuffleSampler,
    SuperERLearner,
    fit,
)

KINDS = {
    "reservoir": lambda where, **more: ReservoirBuffer(60, where, seed=3, **more),
    "balanced": lambda where, **more: ClassBalancedBuffer(60, where, seed=3, **more),
    "infinite": lambda where, **more: InfiniteBuffer(where, rows_per_part=40, seed=3, **more),
}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch.distributed")


def feed(buffer: Any, n: int = 100) -> None:
    buffer.add((np.arange(n, dtype=np.float32), np.arange(n) % 2))


def keys(state: Any) -> set[str]:
    return set(flatten_state_dict(state)[0])


def positions(buffer: Any, times: int = 3) -> list[list[int]]:
    return [buffer.sample(5)[1]["position"].tolist() for _ in range(times)]


@pytest.mark.parametrize("kind", KINDS)
def test_buffer(kind: str, tmp_path: Path) -> None:
    path, saved = tmp_path / "b.h5", tmp_path / "checkpoint"
    with KINDS[kind](path) as buffer:
        fresh = buffer.state_dict()
        feed(buffer)
        positions(buffer)
        state = buffer.state_dict()
        assert keys(state) == keys(fresh)
        dcp.save({"buffer": state}, checkpoint_id=saved)
        coming = positions(buffer)
        feed(buffer)
    with leanreplay.open(path, mode="r+") as again:
        loaded = {"buffer": again.state_dict()}
        dcp.load(loaded, checkpoint_id=saved)
        assert loaded["buffer"] == state
        again.load_state_dict(loaded["buffer"])
        assert again.seen == 100
        assert positions(again) == coming


def test_the_best_of_20_checkpoints(tmp_path: Path) -> None:
    """Frameworks write many checkpoints and keep the best: its state was kept, so training goes on from it to the same weights."""
    path, best_file = tmp_path / "b.h5", tmp_path / "best.pt"
    x = torch.randn(21 * 40, 6, generator=torch.Generator().manual_seed(1))

    def learner_on(buffer: Any) -> ERLearner:
        torch.manual_seed(0)
        model = torch.nn.Linear(6, 3)
        return ERLearner(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), buffer, replay_batch_size=8)

    def train(learner: ERLearner, checkpoint: int) -> float:
        for part in x[40 * checkpoint : 40 * checkpoint + 40].split(10):
            loss = float(learner.step(part, part[:, :3].argmax(1)).loss)
        return loss if checkpoint < 16 else 1e9  # so that others come after the best

    def weights(learner: ERLearner) -> list[float]:
        return learner.model.weight.flatten().tolist()

    best, best_loss, kept, trained = -1, 1e9, None, []
    with ReservoirBuffer(30, path, seed=3) as buffer:
        learner = learner_on(buffer)
        for checkpoint in range(20):
            loss = train(learner, checkpoint)
            trained.append(weights(learner))
            state = learner.state_dict()
            if loss < best_loss:
                best, best_loss = checkpoint, loss
                buffer.keep(state["buffer"])
                torch.save((state, learner.model.state_dict(), learner.optimizer.state_dict()), best_file)
                if kept is not None:
                    buffer.release(kept)
                kept = state["buffer"]
    assert 2 < best < 16
    with ReservoirBuffer(path=path, mode="r+") as buffer:
        learner = learner_on(buffer)
        state, model_state, optimizer_state = torch.load(best_file, weights_only=True)
        assert buffer.kept_states() == [state["buffer"]]
        learner.load_state_dict(state)
        learner.model.load_state_dict(model_state)
        learner.optimizer.load_state_dict(optimizer_state)
        for checkpoint in range(best + 1, 20):
            train(learner, checkpoint)
            assert weights(learner) == trained[checkpoint]


def test_replay_loader(tmp_path: Path) -> None:
    path, saved = tmp_path / "b.h5", tmp_path / "checkpoint"
    with ReservoirBuffer(60, path, seed=3) as buffer:
        feed(buffer)
        with ReplayLoader(buffer, 5, prefetch=3) as loader:
            fresh = loader.state_dict()
            list(itertools.islice(loader, 4))
            state = {"buffer": buffer.state_dict(), "loader": loader.state_dict()}
            assert keys(state["loader"]) == keys(fresh)
            dcp.save(state, checkpoint_id=saved)
            coming = [(x, meta["position"]) for (x, _), meta in itertools.islice(loader, 6)]
    with leanreplay.open(path, mode="r+") as again, ReplayLoader(again, 5, prefetch=3) as loader:
        loaded = {"buffer": again.state_dict(), "loader": loader.state_dict()}
        dcp.load(loaded, checkpoint_id=saved)
        again.load_state_dict(loaded["buffer"])
        loader.load_state_dict(loaded["loader"])
        for ((x, _), meta), (x_before, positions_before) in zip(loader, coming, strict=False):
            assert torch.equal(x, x_before)
            assert torch.equal(meta["position"], positions_before)
            if loader._delivered == 10:
                break


def interleaved() -> InterleavedSampler:
    callback = SamplerIntervalConfig(SequentialSampler(range(100, 104)), every_n_updates=3)
    return InterleavedSampler(ShuffleSampler(range(20), seed=1), InterleavedSamplerConfig(4, max_epochs=3), callback_samplers=[callback])


def test_interleaved_sampler(tmp_path: Path) -> None:
    whole = [batch.tolist() for batch in interleaved().get_data_loader()]
    sampler = interleaved()
    fresh = sampler.state_dict()
    before = [batch.tolist() for batch in itertools.islice(sampler.get_data_loader(), 7)]
    state = sampler.state_dict()
    assert keys(state) == keys(fresh)
    dcp.save({"sampler": state}, checkpoint_id=tmp_path)
    again = interleaved()
    loaded = {"sampler": again.state_dict()}
    dcp.load(loaded, checkpoint_id=tmp_path)
    again.load_state_dict(loaded["sampler"])
    assert before + [batch.tolist() for batch in again.get_data_loader()] == whole


class Stateful:
    """Draws from a buffer, as an iterable dataset whose state a StatefulDataLoader keeps."""

    def __init__(self, buffer: Any) -> None:
        self.buffer = buffer

    def __iter__(self) -> Any:
        while True:
            yield self.buffer.sample(5)[1]["position"]

    def state_dict(self) -> Any:
        return self.buffer.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.buffer.load_state_dict(state)


def test_stateful_data_loader(tmp_path: Path) -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader

    class Draws(Stateful, torch.utils.data.IterableDataset[Any]):
        pass

    with ReservoirBuffer(60, tmp_path / "b.h5", seed=3) as buffer:
        feed(buffer)
        loader = stateful(Draws(buffer), batch_size=None)
        iterator = iter(loader)
        for _ in range(3):
            next(iterator)
        state = loader.state_dict()
        torch.save(state, tmp_path / "state.pt")
        coming = [next(iterator).tolist() for _ in range(3)]
        again = stateful(Draws(buffer), batch_size=None)
        again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        iterator = iter(again)
        assert [next(iterator).tolist() for _ in range(3)] == coming
        shown = stateful(BufferDataset(buffer), batch_size=8)
        iterator = iter(shown)
        next(iterator)
        state, rest = shown.state_dict(), [x.tolist() for x, _ in iterator]
        again = stateful(BufferDataset(buffer), batch_size=8)
        again.load_state_dict(state)
        assert [x.tolist() for x, _ in again] == rest


def test_accelerate(tmp_path: Path) -> None:
    accelerator = pytest.importorskip("accelerate").Accelerator(cpu=True)
    with ReservoirBuffer(60, tmp_path / "b.h5", seed=3) as buffer:
        feed(buffer)
        with ReplayLoader(buffer, 5) as loader:
            accelerator.register_for_checkpointing(buffer, loader)
            next(loader)
            accelerator.save_state(str(tmp_path / "state"))
            coming = [next(loader)[1]["position"].tolist() for _ in range(4)], positions(buffer)
            feed(buffer)
            accelerator.load_state(str(tmp_path / "state"))
            assert buffer.seen == 100
            assert ([next(loader)[1]["position"].tolist() for _ in range(4)], positions(buffer)) == coming


def learner(kind: Any, path: Path, mode: str = "a", **options: Any) -> Any:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    options |= {"pod_alpha": 0.0} if kind is SuperERLearner else {}
    with_mode = leanreplay.open(path) if mode == "r" else ReservoirBuffer(20, path, mode=mode)
    return kind(model, torch.optim.SGD(model.parameters(), 0.1), with_mode, mask_unused_classes=True, seed=1, **options)


def trained(of: Any, steps: int, first: int = 0) -> list[Any]:
    """The losses and the draws of some steps, and the weights after them."""
    found: list[Any] = []
    for i in range(first, first + steps):
        generator = torch.Generator().manual_seed(i)
        found.append(of.step(torch.randn(6, 4, generator=generator), torch.arange(6) % 3).losses)
    return [*found, of.model.weight.tolist(), of.buffer.get_metadata("position").tolist(), [keys(of.state_dict())]]


@pytest.mark.parametrize("kind", [ERLearner, DERLearner, CLSLearner, SuperERLearner])
def test_learner(kind: Any, tmp_path: Path) -> None:
    """Tasks, classes, copies of the model, draws: a fresh learner, in a new process say, goes on as this one does."""
    made = learner(kind, tmp_path / "b.h5")
    fresh = keys(made.state_dict())
    made.on_task_start("cats")
    trained(made, 4)
    state = made.state_dict()
    assert keys(state) == fresh
    parts = {"model": made.model.state_dict(), "learner": state}
    dcp.save(parts, checkpoint_id=tmp_path / "checkpoint")
    coming = trained(made, 3, 4)
    made.buffer.close()
    again = learner(kind, tmp_path / "b.h5")
    loaded = {"model": again.model.state_dict(), "learner": again.state_dict()}
    dcp.load(loaded, checkpoint_id=tmp_path / "checkpoint")
    again.model.load_state_dict(loaded["model"])
    again.load_state_dict(loaded["learner"])
    assert again.steps == 4 and again.task == "cats" and trained(again, 3, 4) == coming


def test_learner_of_a_reader(tmp_path: Path) -> None:
    """What only reads its buffer has a state too: its draws go on; another content is refused."""
    with ReservoirBuffer(20, tmp_path / "b.h5") as buffer:
        buffer.add((np.random.rand(30, 4).astype("f4"), np.arange(30) % 3))
    made = learner(ERLearner, tmp_path / "b.h5", "r", store=False)
    trained(made, 3)
    state, weights = made.state_dict(), made.model.state_dict()
    weights = {name: value.clone() for name, value in weights.items()}
    coming = trained(made, 3)
    again = learner(ERLearner, tmp_path / "b.h5", "r", store=False)
    assert keys(again.state_dict()) == keys(state)
    again.load_state_dict(state)
    again.model.load_state_dict(weights)
    assert trained(again, 3) == coming
    for wrong in (None, {}, {**state["buffer"], "seen": 29}, {**state["buffer"], "draws": {"sample": -1}}, {**state["buffer"], "draws": 3}):
        with pytest.raises(leanreplay.StateError, match="only reads what"):
            again.load_state_dict({**state, "buffer": wrong})


def test_accelerate_and_a_learner(tmp_path: Path) -> None:
    """register_for_checkpointing(learner)."""
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    made = learner(DERLearner, tmp_path / "b.h5")
    accelerator.register_for_checkpointing(made)
    trained(made, 4)
    accelerator.save_state(str(tmp_path / "state"))
    weights = {name: value.clone() for name, value in made.model.state_dict().items()}
    coming = trained(made, 3, 4)
    accelerator.load_state(str(tmp_path / "state"))
    made.model.load_state_dict(weights)
    assert made.steps == 4 and trained(made, 3, 4) == coming


# -- buffers in memory ---------------------------------------------------------------------------------------------------


def told(work: Any) -> list[Any]:
    """The warnings of a VolatileStateWarning."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        work()
    return [w for w in found if issubclass(w.category, leanreplay.VolatileStateWarning)]


@pytest.mark.parametrize("kind", KINDS)
def test_a_buffer_in_memory_says_that_its_state_ends_with_the_process(kind: str, tmp_path: Path) -> None:
    with KINDS[kind](None) as buffer, KINDS[kind](tmp_path / "b.h5") as on_disk:
        assert told(buffer.state_dict) == []  # every buffer begins like this
        feed(buffer)
        feed(on_disk)
        (first,) = told(buffer.state_dict)
        assert first.filename == __file__
        assert "path" in str(first.message)
        assert "save(folder)" in str(first.message)
        assert told(buffer.state_dict) == []
        assert told(on_disk.state_dict) == []


def test_a_warning_that_is_an_error_changes_nothing() -> None:
    with ReservoirBuffer(60) as buffer:
        feed(buffer)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(leanreplay.VolatileStateWarning):
                buffer.state_dict()
            feed(buffer)
            buffer.load_state_dict(buffer.state_dict())


def test_learners_warn_and_fit_does_not_where_it_copies_the_buffer(tmp_path: Path) -> None:
    def made() -> Any:
        model = torch.nn.Linear(3, 2)
        return ERLearner(model, torch.optim.SGD(model.parameters(), 0.1), ReservoirBuffer(20))

    data = torch.rand(24, 3), torch.arange(24) % 2
    learner = made()
    learner.step(*data)
    (first,) = told(learner.state_dict)
    assert first.filename == __file__
    learner = made()

    def run() -> None:
        fit(learner, data, max_epochs=1, batch_size=8, progress=False, output_state_folder=tmp_path, save_buffer=True)

    assert told(run) == []
    assert learner.buffer.seen == 24
