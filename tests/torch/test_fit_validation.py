"""What fit measures: on the model that the method evaluates, on earlier tasks' samples, and in training; and where the model is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from training_jobs import N, accuracy, bits, data, make, run

from leanreplay import (
    ArgumentError,
    ClassBalancedBuffer,
    ExperienceBalancedBuffer,
    ModeError,
    ReservoirBuffer,
    StateError,
    WeightedReservoirBuffer,
)
from leanreplay.torch import CLSLearner, ERLearner
from leanreplay.torch.training.settings import place


def test_the_model_that_the_method_evaluates(tmp_path):
    """CLS-ER: validation, best.pt and the best weights in the end are the stable copy's; the model goes on as it was."""
    learner, plain = (make(CLSLearner, path, stable_model_update_weight=0.9) for path in (tmp_path / "b.h5", None))
    x, y = data(30, 9)
    learner.optimizer.param_groups[0]["lr"] = plain.optimizer.param_groups[0]["lr"] = 2.0  # the best epoch is not the last one
    history = run(learner, val_dataset=(x, y), restore_best=True, max_epochs=4, output_state_folder=tmp_path / "run")
    run(plain, max_epochs=4)
    best = torch.load(tmp_path / "run" / "best.pt", weights_only=True)
    stable = learner.stable_model.eval()
    assert all(value.equal(best[name]) for name, value in stable.state_dict().items())
    assert history.best == pytest.approx(cross_entropy(stable(x), y).item(), rel=1e-5) and history.best_epoch != 3
    assert all(a.equal(b) for a, b in zip(learner.model.parameters(), plain.model.parameters(), strict=True))
    assert not all(a.equal(b) for a, b in zip(learner.model.parameters(), stable.parameters(), strict=True))


MEMORIES = {
    "reservoir": lambda path=None: ReservoirBuffer(20, path, seed=1, mode="a"),
    "classes": lambda path=None: ClassBalancedBuffer(20, path, seed=1, mode="a"),
    "tasks": lambda path=None: ExperienceBalancedBuffer(20, path, seed=1, mode="a"),
}


@pytest.mark.parametrize("kind", MEMORIES)
def test_a_memory_of_validation_samples(kind):
    """It is offered each task's whole set at the task's end; the next validates on both, after the test transforms."""
    learner, memory = make(), MEMORIES[kind]()
    sets = [data(33, 50 + task) for task in range(3)]
    for task, name in enumerate([0, "dogs", 2] if kind == "tasks" else range(3)):
        before = memory.get(memory.get_metadata("idx"))[0] if task else (np.zeros((0, 6), "float32"), np.zeros(0, "int64"))
        history = run(learner, task, task_id=name, val_dataset=sets[task], val_memory=memory, test_transform=lambda v: 2 * v, max_epochs=2)
        assert memory.seen == 33 * (task + 1)
        learner.model.eval()
        x, y = (torch.cat([new, torch.from_numpy(old)]) for new, old in zip(sets[task], before, strict=True))
        assert history["val_loss"][-1] == pytest.approx(cross_entropy(learner.model(2 * x), y).item(), rel=1e-5)
        learner.model.train()
    if kind == "tasks":
        assert memory.group_sizes() == {0: 7, 1: 7, 2: 6} or sorted(memory.group_sizes().values()) == [6, 7, 7]
    again = MEMORIES[kind]()
    for task, (x, y) in enumerate(sets):
        again.add((x, y), **({"experience": task} if kind == "tasks" else {}))
    assert all(np.array_equal(a, b) for a, b in zip(again.get(range(20))[0], memory.get(range(20))[0], strict=True))


def test_a_memory_is_part_of_the_state(tmp_path):
    """A copy of it goes with that of the buffer; a run without it does not go on from a state with it."""
    options = {"val_dataset": data(33, 50), "max_epochs": 2}
    run(make(), val_memory=MEMORIES["classes"](), output_state_folder=tmp_path / "run", save_buffer=True, **options)
    learner, memory = make(), MEMORIES["classes"]()
    run(learner, val_memory=memory, input_state_folder=tmp_path / "run", **options)
    assert memory.seen == 33 and learner.buffer.seen == N
    with pytest.raises(StateError, match=r"val_memory=False \(state: True\)"):
        run(make(), input_state_folder=tmp_path / "run", **options)


def test_memories_that_take_no_samples(tmp_path):
    """Are refused before anything is trained."""
    with MEMORIES["reservoir"](tmp_path / "m.h5") as full:
        full.add(data(5))
    reading = ReservoirBuffer(path=tmp_path / "m.h5", mode="r")
    learner = make()
    before = bits(learner)
    for memory, error, message in [
        (reading, ModeError, "val_memory .* open for reading only"),
        (WeightedReservoirBuffer(20), ArgumentError, "weight"),
        ("all", ArgumentError, "val_memory must be a buffer"),
        (learner.buffer, ArgumentError, "val_memory is the learner's own buffer"),
    ]:
        with pytest.raises(error, match=message):
            run(learner, val_dataset=data(5), val_memory=memory)
    with pytest.raises(ArgumentError, match="val_memory keeps samples of val_dataset; give one"):
        run(learner, val_memory=MEMORIES["reservoir"]())
    with pytest.raises(ArgumentError, match="a buffer in memory ends with its process"):
        run(make(path=tmp_path / "b.h5"), val_dataset=data(5), val_memory=MEMORIES["reservoir"](), output_state_folder=tmp_path / "run")
    assert bits(learner) == before


def test_metrics_of_training():
    """Means over the new samples, of what the model answered before each step, against the targets of the loss."""
    seen = []

    class Recording(ERLearner):
        def step(self, x, y):
            made = super().step(x, y)
            seen.append((float((made.outputs.argmax(1) == 3 - y).float().mean()), len(y)))
            return made

    history = run(make(Recording, target_transform=lambda y: 3 - y), train_metrics={"accuracy": accuracy}, max_epochs=2)
    for epoch, part in enumerate(np.split(np.array(seen), 2)):
        assert history["accuracy"][epoch] == pytest.approx(np.average(part[:, 0], weights=part[:, 1]))
    for name in ("loss", "lr", "loss/replay", "val_loss"):
        with pytest.raises(ArgumentError, match=f"train_metrics: '{name}' is a quantity of fit's own"):
            run(make(), train_metrics={name: accuracy})
    with pytest.raises(ArgumentError, match=r"train_metrics\['m'\] must give a number, got tensor"):
        run(make(), train_metrics={"m": lambda outputs, targets: outputs})


def test_a_device_for_everything():
    """Model, copies and the optimizer's state go to it. (A device without numbers: no other is there.)"""
    learner = make(CLSLearner)
    run(learner, max_epochs=1, device="cpu")
    torch.__future__.set_swap_module_params_on_conversion(True)  # else parameters are others on that device
    try:
        place(learner, torch.device("meta"))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    momenta = [state["momentum_buffer"] for state in learner.optimizer.state.values()]
    modules = [learner.model, learner.stable_model, learner.plastic_model]
    assert {t.device.type for t in [*momenta, *(v for m in modules for v in m.state_dict().values())]} == {"meta"} and momenta
    assert {*learner.model.parameters()} == {*learner.optimizer.param_groups[0]["params"]}
    with pytest.raises(ArgumentError, match="device: "):
        run(make(), device="nowhere")
