"""Numba kernels: plain functions on NumPy arrays, which import nothing else of the library."""
