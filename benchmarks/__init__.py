"""Benchmarks: what the library costs beside physical limits and beside other libraries, in interleaved runs. Never part of the tests."""
