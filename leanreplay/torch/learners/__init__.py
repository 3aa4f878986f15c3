"""Learners: one file for each method. `step` is one training step; `loss` and `after_step` are the same in pieces."""

from __future__ import annotations

from .er import ERLearner, Step

__all__ = ["ERLearner", "Step"]
