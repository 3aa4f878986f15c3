"""Leaves of samples: arrays, tensors and numbers on their way into a field, checked and converted.

Leaves are NumPy arrays, torch tensors (recognised without importing torch) or Python numbers.
"""

from __future__ import annotations

import functools
import math
import numbers
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..arguments import is_tensor
from ..errors import SchemaError

KINDS = "biufcS"  # of dtypes that can be stored
_ENCODE = "np.char.encode({}, 'utf-8').astype('S32')"


@dataclass(frozen=True)
class Field:
    """One stored column: `name` in the file, `dtype` and `shape` of one sample's entry.

    torch: "bfloat16" where the column holds the bits of that torch dtype as uint16, otherwise None.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    torch: str | None = None

    @functools.cached_property
    def nbytes(self) -> int:
        """Bytes of one entry."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{self.name}: {self.torch or self.dtype.str.lstrip('<|=')}{list(self.shape)}"


def as_leaf(leaf: Any, path: str) -> Any:
    """Return a leaf as an array or a tensor.

    What exports its numbers (an image of PIL, a data frame, a memoryview) is converted: once,
    because that may be slow. Raises SchemaError for what cannot be stored, with the way out.
    """
    if type(leaf) is np.ndarray or is_tensor(leaf):
        return leaf
    if isinstance(leaf, np.ma.MaskedArray):
        raise SchemaError(f"{path}: a masked array cannot be stored, its mask would be lost; use .filled(value), or store the mask too")
    if not isinstance(leaf, (bool, int, float, complex, np.generic)) and not _exports(leaf):
        raise SchemaError(f"{path}: a leaf must be an array, a tensor or a number, not {type(leaf).__name__}{_leaf_hint(leaf)}")
    try:
        array = np.asarray(leaf)
    except Exception as error:  # whatever the object's own method raises
        raise SchemaError(f"{path}: {type(leaf).__name__} cannot become an array: {type(error).__name__}: {error}") from error
    if array.dtype.kind == "O" and hasattr(leaf, "columns"):
        columns = "{c: df[c].to_numpy() for c in df.columns}"
        raise SchemaError(f"{path}: a {type(leaf).__name__} of columns of several types; give them one by one: {columns}")
    return array


def _exports(leaf: Any) -> bool:
    """Whether an object says that it can be an array. (NumPy would also try to iterate over it.)"""
    if isinstance(leaf, (bytes, str, type)):
        return False
    if any(hasattr(leaf, name) for name in ("__array__", "__array_interface__", "__array_struct__")):
        return True
    try:
        memoryview(leaf)
    except Exception:
        return False
    return True


def _leaf_hint(leaf: Any) -> str:
    """Say what to do with an object that is no leaf."""
    if isinstance(leaf, str):
        return f"; encode text as bytes of one width, long enough for all: {_ENCODE.format('text')}"
    if isinstance(leaf, bytes):
        return "; give bytes one width, long enough for all: np.array(value, 'S32')"
    if leaf is None:
        return "; leave it out, or give a number that stands for it"
    if hasattr(leaf, "toordinal"):
        return "; store a date as a number: .timestamp(), or .toordinal()"
    if hasattr(leaf, "toarray"):
        return "; make it dense: .toarray()"
    if isinstance(leaf, numbers.Number):
        return "; make it a number of Python's: float(value)"
    if isinstance(leaf, Sequence):
        return "; make it one array: np.array(values) of numbers, np.stack(values) of arrays; a list of samples goes to update()"
    if hasattr(leaf, "__iter__") or hasattr(leaf, "__getitem__"):
        return "; make an array of what holds numbers: np.array(list(values)); a dataset goes to update(), batches one by one to add()"
    return ""


def _tensor_type(leaf: Any, path: str) -> tuple[np.dtype[Any], tuple[int, ...], str | None]:
    name = str(leaf.dtype).removeprefix("torch.")
    if leaf.is_nested:
        raise SchemaError(f"{path}: the samples of a nested tensor differ in shape; pad them: torch.nested.to_padded_tensor(t, 0.0)")
    if leaf.layout is not sys.modules["torch"].strided:
        raise SchemaError(f"{path}: a {leaf.layout} tensor cannot be stored; make it dense with .to_dense()")
    if leaf.device.type == "meta":
        raise SchemaError(f"{path}: a tensor on the meta device has no values to store")
    try:
        shape = tuple(leaf.shape)
    except RuntimeError as error:
        raise SchemaError(f"{path}: {type(leaf).__name__} has no shape: {error}") from None
    if name == "bfloat16":
        return np.dtype(np.uint16), shape, name
    try:
        return np.dtype({"complex32": ""}.get(name, name)), shape, None
    except TypeError:
        hint = ".dequantize(), or .int_repr()" if leaf.is_quantized else ".float()" if leaf.is_floating_point() else ""
        hint = ".to(torch.complex64)" if name == "complex32" else hint or ".to(torch.int64)"
        raise SchemaError(f"{path}: torch dtype {name} cannot be stored, NumPy has none like it; convert it with {hint}") from None


def leaf_type(leaf: Any, path: str) -> tuple[np.dtype[Any], tuple[int, ...], str | None]:
    """Return (dtype as stored, whole shape, torch name) of a leaf; SchemaError if it has none."""
    if is_tensor(leaf):
        return _tensor_type(leaf, path)
    array = as_leaf(leaf, path)
    dtype = array.dtype
    if dtype.kind not in KINDS or dtype.hasobject:
        hint = {
            "U": f"encode it as bytes of one width, long enough for all batches: {_ENCODE.format('a')}",
            "M": "store it as integers: a.astype('int64')",
            "m": "store it as integers: a.astype('int64')",
            "V": "store its bytes: a[..., None].view('u1')",
            "O": "np.array(a.tolist()) makes one array of entries of one shape and of 64 bits; pad them where they differ, and make "
            "larger integers floats",
        }.get(dtype.kind, "convert it to numbers")
        if dtype.names:
            hint = "store its fields as separate arrays: {name: a[name] for name in a.dtype.names}"
        raise SchemaError(f"{path}: dtype {dtype} cannot be stored; {hint}")
    if dtype == np.longdouble and dtype.itemsize > 8:
        raise SchemaError(f"{path}: dtype {dtype} differs between machines; use a.astype('float64')")
    if dtype.kind == "c" and dtype.itemsize > 16:
        raise SchemaError(f"{path}: dtype {dtype} differs between machines; use a.astype('complex128')")
    return dtype if dtype.isnative else dtype.newbyteorder("="), array.shape, None


def to_numpy(leaf: Any, field: Field, rows: Any = None) -> np.ndarray[Any, Any]:
    """Return a leaf, or some rows of it, as a C-contiguous, native array: itself if it is one."""
    if is_tensor(leaf):
        try:
            array = _tensor_values(leaf, field, rows)
        except Exception as error:  # a subclass, or a transformation of torch, that has no values
            raise SchemaError(f"{field.name}: the values of this {type(leaf).__name__} cannot be read: {error}") from error
    else:
        array = np.asarray(leaf)
        if rows is not None:
            array = array[rows]
    # NumPy makes a single number an array of one dimension here.
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("=")).reshape(array.shape)


def _tensor_values(leaf: Any, field: Field, rows: Any) -> np.ndarray[Any, Any]:
    leaf = leaf.detach()
    torch = sys.modules["torch"]
    if rows is not None:
        leaf = leaf.index_select(0, torch.as_tensor(rows, device=leaf.device))
    leaf = leaf.cpu()
    if field.torch:
        leaf = leaf.view(torch.int16)
    array = leaf.resolve_conj().resolve_neg().numpy()
    return array.view(np.uint16) if field.torch else array  # type: ignore[no-any-return]


def check_leaf(leaf: Any, field: Field, n: int | None) -> Any:
    """Return the leaf if it is n entries of the field (None: one entry). SchemaError otherwise."""
    leaf = as_leaf(leaf, field.name)
    dtype, shape, torch = leaf_type(leaf, field.name)
    wanted = field.shape if n is None else (n, *field.shape)
    if shape != wanted or dtype != field.dtype or torch != field.torch:
        bytes_of = f"; of bytes: .astype('{field.dtype.str[1:]}'), which cuts longer ones" if dtype.kind == field.dtype.kind == "S" else ""
        raise SchemaError(
            f"{field.name}: expected {field.torch or field.dtype} of shape {wanted}, got {torch or dtype} of shape {shape}; "
            f"every sample must have the shape and dtype of the first: convert, pad or crop it before storing{bytes_of}"
        )
    return leaf


def entry(leaf: Any, field: Field) -> np.ndarray[Any, Any]:
    """Return one sample's leaf as an array of the field's dtype, which Python numbers take."""
    plain = field.torch is None and (type(leaf) is np.ndarray or isinstance(leaf, np.generic))
    if plain and leaf.dtype == field.dtype and leaf.shape == field.shape:
        return leaf  # type: ignore[return-value]  # a single number does what an array does here
    if isinstance(leaf, (bool, int, float, complex)) and not isinstance(leaf, np.generic) and field.shape == ():
        kind = "b" if isinstance(leaf, bool) else "iu" if isinstance(leaf, int) else "f" if isinstance(leaf, float) else "c"
        if field.torch is None and field.dtype.kind in kind:
            try:
                return np.array(leaf, field.dtype)
            except OverflowError:
                raise SchemaError(f"{field.name}: {leaf} does not fit into {field.dtype}") from None
    return to_numpy(check_leaf(leaf, field, None), field)


def batch_leaf(leaf: Any, path: str) -> Any:
    """Return a leaf of a batch. Raises SchemaError for one without a leading dimension."""
    if hasattr(leaf, "getbands"):  # of PIL: its rows of pixels are no samples
        raise SchemaError(f"{path}: a single image is no batch; give a list of images, or call update(list of samples)")
    if are_images(leaf):
        arrays = [as_leaf(image, path) for image in leaf]
        if len({(array.shape, array.dtype) for array in arrays}) > 1:
            raise SchemaError(f"{path}: the images of a batch differ in size or mode: resize or crop them, and convert() them, before")
        return np.stack(arrays)
    found = as_leaf(leaf, path)
    if not leaf_type(found, path)[1]:
        raise SchemaError(
            f"{path}: a batch needs a leading dimension, got a single {type(leaf).__name__}; "
            "make one value for all np.full(n, value), of a list of them np.stack(values), and give a list of samples to update()"
        )
    return found


def are_images(value: Any) -> bool:
    """Whether a value is a list of images of PIL, which as a batch can only mean one leaf."""
    return isinstance(value, (list, tuple)) and len(value) > 0 and all(hasattr(one, "getbands") for one in value)


def batch_length(leaves: Sequence[Any], fields: Sequence[Field]) -> int:
    """Return the one leading dimension of leaves that `batch_leaf` made; SchemaError otherwise."""
    lengths = {field.name: leaf_type(leaf, field.name)[1][0] for leaf, field in zip(leaves, fields, strict=True)}
    if len(set(lengths.values())) > 1:
        raise SchemaError(
            f"the leaves of a batch differ in length: {lengths}; each holds the same samples, (n, ...): "
            "stack lists of samples, np.stack(values), or give them to update()"
        )
    return int(next(iter(lengths.values())))
