"""What a nightly run does beyond the default one: more repetitions of what is random, and the same checks of more kinds of buffers.

`LEANREPLAY_NIGHTLY=1 pytest` runs everything in full, in about three times the time. Assertions are the same in both.
"""

from __future__ import annotations

import os
import re

NIGHTLY = os.environ.get("LEANREPLAY_NIGHTLY", "") not in ("", "0")


def times(default: int, nightly: int) -> int:
    """The number of repetitions of this run."""
    return nightly if NIGHTLY else default


# Tests of a file that only a nightly run makes. By default the same checks are made of the kinds of buffers (learners, workers) that do
# most: what is left out shares the code with them.
LEFT_OUT = {
    "test_async_ends": r"test_ctrl_c\[(wait|begin|train-fork-no)",
    "test_async_sources": r"dies_sending-False|dies_sending-True-1",
    "test_at_once": r"test_stopped_at_every_line\[(window|reservoir)|test_a_signal_handler\[.*Reservoir",
    "test_balanced_kill": r"\[(fixed|borrow)",
    "test_balanced_kill_steps": r"\[(fixed|borrow)",
    "test_damaged_files": r"test_parameters_that_lie",  # test_hostile.py does that to every kind
    "test_examples": r"test_resume_of_a_finished_run|test_killed_at_|test_mnist",
    "test_fit_resume": r"test_killed_anywhere\[(Super|CLS)",
    "test_interleaved_resume": r"test_resume_every_position_with_workers\[2",
    "test_kernels": r"test_kernel_tests_without_jit",  # each is called as Python as well
    "test_kill": r"\[(greedy|window)",
    "test_kill_steps": r"\[(greedy|window)",
    "test_loader": r"\[(greedy|window).*(asleep|held|done)",
    "test_loader_ends": r"test_ctrl_c_at_every_line\[(balance|transform)",
    "test_memory": r"\[(update|classes)",
    "test_merge_kills": r"test_memory_stays_small",
    "test_parametric": r"test_any_history\[(Random|Closest|Largest)",
    "test_power": r"\[(greedy|window)",
    "test_quotas": r"test_uniform_within_groups\[(fixed|borrow)|test_random_streams\[(fixed|borrow)",
    "test_torch": r"test_data_loader_sees_commits\[(ram|parts)-.*persistent",
    "test_undo_files": r"\[(greedy|window)",
}


def is_left_out(file: str, name: str) -> bool:
    """Whether a test is not part of this run. file: without its ending; name: with its parameters."""
    return not NIGHTLY and file in LEFT_OUT and re.search(LEFT_OUT[file], name) is not None
