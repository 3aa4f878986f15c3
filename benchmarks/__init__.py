"""Benchmarks: what the library costs beside a physical limit, in one interleaved run. Never part of the tests."""
