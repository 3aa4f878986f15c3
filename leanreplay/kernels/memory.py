"""Machine instructions on the bytes of a mapped file, and where its columns lie.

A mapped file is one flat uint8 array `mem`. `cols`, (fields + 3, 2) uint64, has a row for each
column: (byte offset, bytes per row) of every field, then of positions (int64), groups (int64) and
checksums (uint64 per field). So every kernel compiles once, whatever the dtypes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import config

from . import helper

FREE = np.uint64(0xFFFFFFFFFFFFFFFF)  # the position, -1, of a free row
_3, _6, _63, _LINES = (np.uint64(i) for i in (3, 6, 63, 16))


def prefetch(mem: Any, at: Any) -> None:
    """Do nothing: Python itself runs the kernel."""


def fence(mem: Any) -> None:
    """Do nothing: Python itself runs the kernel."""


def as_words(mem: Any) -> Any:
    """Return a byte array as uint64 words, without the bytes left over at the end."""
    return mem[: mem.shape[0] - mem.shape[0] % 8].view(np.uint64)


def load_word(mem: Any, at: Any) -> Any:
    """Return the 8 bytes at mem[at:] as a word, at any alignment."""
    return mem[int(at) : int(at) + 8].view(np.uint64)[0]


def copy_memory(dst: Any, d: Any, src: Any, s: Any, n: Any) -> None:
    """Copy n bytes from src[s:] to dst[d:]."""
    dst[int(d) : int(d) + int(n)] = src[int(s) : int(s) + int(n)]


PLAIN = {f.__name__: f for f in (prefetch, fence, as_words, load_word, copy_memory)}  # in Python

if not config.DISABLE_JIT:  # type: ignore[attr-defined]
    from llvmlite import ir
    from numba.core import cgutils, types
    from numba.core.imputils import impl_ret_borrowed
    from numba.extending import intrinsic
    from numba.np.arrayobj import populate_array

    def _pointer(bits: int, context: Any, builder: Any, kind: Any, mem: Any, at: Any) -> Any:
        data = context.make_array(kind)(context, builder, mem).data
        return builder.bitcast(builder.gep(data, [at]), ir.IntType(bits).as_pointer())

    @intrinsic  # type: ignore[no-redef]
    def prefetch(_context: Any, mem: Any, at: Any) -> Any:
        """Ask for the cache line of mem[at]: random rows come twice as fast so (measured)."""

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            address = _pointer(8, context, builder, signature.args[0], *args)
            i32 = ir.IntType(32)
            kind = ir.FunctionType(ir.VoidType(), [address.type, i32, i32, i32])
            hint = builder.module.declare_intrinsic("llvm.prefetch", [address.type], kind)
            # Into the second level, which takes more of them at once.
            builder.call(hint, [address, i32(0), i32(2), i32(1)])
            return context.get_dummy_value()

        return types.void(mem, types.intp), generate

    @intrinsic  # type: ignore[no-redef]
    def fence(_context: Any, mem: Any) -> Any:
        """Let neither compiler nor processor move stores over this, nor drop any before it."""

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            builder.fence("acq_rel")
            return context.get_dummy_value()

        return types.void(mem), generate

    @intrinsic  # type: ignore[no-redef]
    def load_word(_context: Any, mem: Any, at: Any) -> Any:

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.load(_pointer(64, context, builder, signature.args[0], *args), align=1)

        return types.uint64(mem, types.uint64), generate

    @intrinsic  # type: ignore[no-redef]
    def copy_memory(_context: Any, dst: Any, d: Any, src: Any, s: Any, n: Any) -> Any:
        """Copy n bytes by memcpy, which knows the processor best."""

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            to = _pointer(8, context, builder, signature.args[0], *args[:2])
            cgutils.raw_memcpy(builder, to, _pointer(8, context, builder, signature.args[2], *args[2:4]), args[4], 1)
            return context.get_dummy_value()

        return types.void(dst, types.uint64, src, types.uint64, types.uint64), generate

    @intrinsic  # type: ignore[no-redef]
    def as_words(_context: Any, mem: Any) -> Any:
        """Return bytes as uint64 words. (A slice and a view compile in ten times the time.)"""

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            source = context.make_array(signature.args[0])(context, builder, args[0])
            made = context.make_array(signature.return_type)(context, builder)
            eight = context.get_constant(types.intp, 8)
            populate_array(
                made,
                data=builder.bitcast(source.data, ir.IntType(64).as_pointer()),
                shape=cgutils.pack_array(builder, [builder.udiv(source.nitems, eight)]),
                strides=cgutils.pack_array(builder, [eight]),
                itemsize=eight,
                meminfo=source.meminfo,
                parent=source.parent,
            )
            return impl_ret_borrowed(context, builder, signature.return_type, made._getvalue())

        return types.Array(types.uint64, 1, "C", readonly=not mem.mutable)(mem), generate


@helper
def prefetch_bytes(mem, at, size):
    """Ask for the first cache lines of the `size` bytes at mem[at:].

    The processor itself goes on from there. Asking for all of 3 KB was slower (measured).
    """
    for i in range(min((size + _63) >> _6, _LINES)):
        prefetch(mem, at + (np.uint64(i) << _6))


@helper
def index_columns(cols):
    """Return the number of fields, and at which words positions, groups and checksums begin."""
    fields = cols.shape[0] - 3
    return fields, cols[fields, 0] >> _3, cols[fields + 1, 0] >> _3, cols[fields + 2, 0] >> _3
