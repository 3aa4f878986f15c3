"""What all tests share: files in memory where possible, and a collector that does not look at what never goes away."""

from __future__ import annotations

import gc
import multiprocessing
import os
import pathlib
import signal
import tempfile
from collections.abc import Iterator

import pytest
from nightly import is_left_out
from paths import in_memory

collect_ignore_glob = ["*/conftest.py", "support/*", "typing/*"]  # which hold no tests
os.environ.setdefault("OMP_NUM_THREADS", "1")  # there are as many test processes as cores
multiprocessing.set_forkserver_preload(["leanreplay.torch", "pytest"])  # which take seconds to import


@pytest.fixture
def tmp_path() -> Iterator[pathlib.Path]:
    """pytest's, but in memory: thousands of files are made and synced here."""
    with tempfile.TemporaryDirectory(dir=in_memory(), ignore_cleanup_errors=True) as folder:
        yield pathlib.Path(folder)


@pytest.fixture(scope="session")
def kernels() -> None:
    """Numba's machinery and the commonest kernels are loaded, which takes a second in every child that is forked without."""
    import numpy as np

    import leanreplay

    with leanreplay.ClassBalancedBuffer(2) as buffer:
        buffer.add((np.zeros((5, 2)), np.arange(5)), metadata={"z": np.zeros(5)})
        buffer.load_state_dict(buffer.state_dict())
        buffer.sample(1)
        assert buffer.check() == []


# Files in the order in which workers take them up. The kernels' tests compile most kernels, so what needs few of them goes beside
# that; then files that take long (file by file, as they share fixtures), so that no worker is left alone with one in the end.
FIRST = (
    "balanced_kernels", "interleaved_resume", "row_kernels", "selection", "key_kernels", "layers", "kernels", "async_reservoir",
)  # fmt: skip
LONG = (
    "examples", "uniform", "kill_steps", "quotas", "balanced_kill_steps", "fuzz", "balanced_kill", "kill", "at_once", "hostile", "loader",
    "readers", "torch", "fit_resume", "loop_examples", "handlers", "balanced", "contract", "power", "faults", "invariance", "copies",
    "processes", "loader_draws", "house", "packaging", "parts", "parametric", "memory", "training",
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    gc.disable()  # until all is collected: what is made till then stays
    config.option.loadscopereorder = False  # of pytest-xdist: files are in order already
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background, where Ctrl-C would be waited for in vain
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = [item for item in items if is_left_out(item.path.stem, item.name)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not is_left_out(item.path.stem, item.name)]
    rank = {f"test_{name}": i for i, name in enumerate((*FIRST, *LONG))}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@pytest.fixture(scope="module", autouse=True)
def frozen() -> None:
    """What earlier files left in memory stays: collections, of which there are many in here, need not look at it again."""
    gc.collect()
    gc.freeze()


def pytest_collection_finish() -> None:
    """Modules and collected tests stay: hundreds of full collections, and every fork, need not touch a million objects of theirs."""
    gc.collect()
    gc.freeze()
    gc.enable()
