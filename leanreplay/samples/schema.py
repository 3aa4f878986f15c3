"""What a sample looks like: a nested structure of arrays <-> flat, named fields of fixed shape and dtype.

A leaf of the sample becomes the field `data/<path>` (`data/0`, `data/1/ids`; a bare array is `data`), a metadata entry
`metadata/<name>`. Leaves are NumPy arrays, torch tensors (recognised without importing torch) or Python numbers.
"""

from __future__ import annotations

import functools
import math
import numbers
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..arguments import is_tensor
from ..errors import SchemaError

RESERVED = ("idx", "position")  # what a sample's metadata holds besides its own fields
_KINDS = "biufcS"
_DEPTH = 16
_MOST_NUMBERS = 16  # in a list: who has more of them means an array
_ENCODE = "np.char.encode({}, 'utf-8').astype('S32')"
_RANK = 31  # dimensions of an entry: HDF5 has 32, one of them the rows


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


@dataclass(frozen=True)
class Schema:
    """The fields of a buffer and the nesting of its samples.

    data: fields of the sample, in order; metadata: fields of the metadata, sorted by name; structure: the nesting,
    as nested lists: ["leaf", i], ["tuple", child, ...], ["list", child, ...] or ["dict", [key, child], ...].

    >>> import numpy as np
    >>> schema = Schema.from_sample((np.zeros((3, 32, 32), "uint8"), 7), metadata={"logits": np.zeros(10, "float32")})
    >>> print(schema)
    Schema(data/0: u1[3, 32, 32], data/1: i8[], metadata/logits: f4[10])
    """

    data: tuple[Field, ...]
    metadata: tuple[Field, ...]
    structure: Any

    @classmethod
    def from_sample(cls, sample: Any, metadata: Mapping[str, Any] | None = None) -> Schema:
        """The schema of one sample (no batch dimension). SchemaError for a list of more than 16 numbers, which is an array to its user."""
        return _infer(sample, metadata, batched=False)

    @classmethod
    def from_batch(cls, batch: Any, metadata: Mapping[str, Any] | None = None) -> Schema:
        """The schema of the samples of a batch, whose leaves have one more leading dimension. SchemaError for a list of samples."""
        return _infer(batch, metadata, batched=True)

    @functools.cached_property
    def fields(self) -> tuple[Field, ...]:
        """All fields in stored order: data, then metadata."""
        return self.data + self.metadata

    @functools.cached_property
    def metadata_names(self) -> list[str]:
        """Names of the metadata, in stored order."""
        return [f.name[len("metadata/") :] for f in self.metadata]

    @functools.cached_property
    def _metadata_set(self) -> set[str]:
        return set(self.metadata_names)

    @functools.cached_property
    def bfloat16(self) -> frozenset[str]:
        """Names of the fields that hold the bits of torch.bfloat16."""
        return frozenset(f.name for f in self.fields if f.torch == "bfloat16")

    @functools.cached_property
    def label_field(self) -> int | None:
        """Index of the field that is the label: the second of a pair, a single integer. None without one."""
        s = self.structure
        if s[0] in ("tuple", "list") and len(s) == 3 and s[2][0] == "leaf":
            field = self.data[s[2][1]]
            if field.shape == () and field.dtype.kind in "iu" and field.torch is None:
                return int(s[2][1])
        return None

    @functools.cached_property
    def _plain_tuple(self) -> int:
        """Length of a sample that is a tuple of arrays, the usual case; 0 for any other nesting."""
        s = self.structure
        return len(s) - 1 if s[0] == "tuple" and all(child[0] == "leaf" for child in s[1:]) else 0

    def __str__(self) -> str:
        return f"Schema({', '.join(map(str, self.fields))})"

    def with_metadata(self, field: Field) -> Schema:
        """This schema with one more metadata field."""
        return Schema(self.data, tuple(sorted((*self.metadata, field), key=lambda f: f.name)), self.structure)

    def flatten(self, sample: Any) -> list[Any]:
        """The leaves of a sample or batch in field order, as they came. Raises SchemaError for another nesting."""
        if type(sample) is tuple and len(sample) == self._plain_tuple:
            return list(sample)
        leaves: list[Any] = []
        _match(self.structure, sample, "data", leaves)
        return leaves

    def flatten_metadata(self, metadata: Mapping[str, Any] | None) -> list[Any]:
        """The metadata values in field order. Raises SchemaError for missing or extra names."""
        if metadata is None:
            metadata = {}
        if type(metadata) is dict and metadata.keys() == self._metadata_set:
            return [metadata[n] for n in self.metadata_names]
        if not isinstance(metadata, Mapping):
            raise SchemaError(f"metadata is a dict of name -> array, not {type(metadata).__name__}")
        names = self.metadata_names
        if len(names) != len(metadata) or any(n not in metadata for n in names):
            missing = sorted(set(names) - set(metadata))
            extra = sorted(str(n) for n in set(metadata) - set(names))
            raise SchemaError(
                f"metadata must have exactly the names {names}: missing {missing}, unexpected {extra}; "
                "give all of them with every batch, or add a new one with set_metadata"
            )
        return [metadata[n] for n in names]

    def unflatten(self, leaves: Sequence[Any]) -> Any:
        """The sample or batch with these leaves (the data fields, in order)."""
        if self._plain_tuple:
            return tuple(leaves)
        return _build(self.structure, leaves)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""

        def one(f: Field) -> dict[str, Any]:
            return {"name": f.name, "dtype": f.dtype.str, "shape": list(f.shape), "torch": f.torch}

        return {"data": [one(f) for f in self.data], "metadata": [one(f) for f in self.metadata], "structure": self.structure}

    @classmethod
    def from_json(cls, value: Any) -> Schema:
        """The schema that `to_json` wrote. Raises SchemaError for anything else: the input may come from a hostile file."""
        try:
            data = tuple(_field_from_json(f) for f in value["data"])
            metadata = tuple(_field_from_json(f) for f in value["metadata"])
            structure = value["structure"]
            found: list[str] = []
            _names(structure, "data", found, 0)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise SchemaError(f"damaged schema: {error}") from None
        if found != [f.name for f in data] or not data:
            raise SchemaError(f"damaged schema: structure names {found}, fields {[f.name for f in data]}")
        names = [f.name for f in metadata]
        if sorted(set(names)) != names or any(not n.startswith("metadata/") for n in names):
            raise SchemaError(f"damaged schema: metadata names {names}")
        for f in metadata:
            metadata_field(f.name[len("metadata/") :], f)
        return cls(data, metadata, structure)


def _field_from_json(value: Any) -> Field:
    if not re.fullmatch(r"[<|][a-zA-Z][0-9]{1,9}", str(value["dtype"])):  # NumPy would parse, and partly evaluate, much more
        raise ValueError(f"dtype {value['dtype']}")
    dtype = np.dtype(str(value["dtype"]))
    shape = tuple(value["shape"])
    if any(type(n) is not int or not 0 < n < 2**48 for n in shape) or len(shape) > _RANK:
        raise ValueError(f"shape {shape}")
    wide = dtype.itemsize > {"f": 8, "c": 16}.get(dtype.kind, 2**40)  # such differ between machines
    if dtype.kind not in _KINDS or wide or dtype.itemsize == 0 or not dtype.isnative or value["torch"] not in (None, "bfloat16"):
        raise ValueError(f"dtype {value['dtype']}")
    if value["torch"] and dtype != np.uint16:
        raise ValueError(f"{value['torch']} as {dtype}")
    size = dtype.itemsize
    for n in shape:
        size *= n
    if size >= 2**48:
        raise ValueError(f"shape {shape}")
    return Field(str(value["name"]), dtype, shape, value["torch"])


def _names(structure: Any, path: str, found: list[str], depth: int) -> None:
    """Collect the field names of a structure from a file, checking its form."""
    if depth > _DEPTH or not isinstance(structure, list):
        raise ValueError("structure")
    kind = structure[0]
    if kind == "leaf":
        if structure != ["leaf", len(found)] or type(structure[1]) is not int:
            raise ValueError("structure: leaves out of order")
        found.append(path)
    elif kind in ("tuple", "list"):
        for i, child in enumerate(structure[1:]):
            _names(child, f"{path}/{i}", found, depth + 1)
    elif kind == "dict":
        keys = [key for key, _ in structure[1:]]
        if len(set(keys)) != len(keys):
            raise ValueError("structure: a key stands twice")
        for key, child in structure[1:]:
            _check_name(key, path)
            _names(child, f"{path}/{key}", found, depth + 1)
    else:
        raise ValueError(f"structure: {kind!r}")


def as_leaf(leaf: Any, path: str) -> Any:
    """A leaf as an array or a tensor. What exports its numbers (an image of PIL, a data frame, a memoryview) is converted, which
    happens once, as it may be slow. Raises SchemaError for what cannot be stored, with the way out."""
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
    """Whether an object says of itself that it can be an array. (NumPy would also try to iterate, over a whole dataset perhaps.)"""
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
    """What to do with an object that is no leaf."""
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
    """(dtype as stored, whole shape, torch name) of a leaf. Raises SchemaError for what cannot be stored."""
    if is_tensor(leaf):
        return _tensor_type(leaf, path)
    array = as_leaf(leaf, path)
    dtype = array.dtype
    if dtype.kind not in _KINDS or dtype.hasobject:
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
    """A leaf (or the given rows of it) as a C-contiguous, native array; no copy where it is one already."""
    if is_tensor(leaf):
        try:
            array = _tensor_values(leaf, field, rows)
        except Exception as error:  # of a subclass, or within a transformation of torch, that has no values
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
    """The leaf, as an array or tensor. Raises SchemaError unless it is n entries of the field (n None: one entry)."""
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
    """One sample's leaf as an array of the field's dtype. Python numbers take it (floats rounded as NumPy does)."""
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
    """A leaf of a batch, as an array or tensor. Raises SchemaError for one without a leading dimension."""
    if hasattr(leaf, "getbands"):  # of PIL: its rows of pixels are no samples
        raise SchemaError(
            f"{path}: a single image is no batch; give np.stack([np.asarray(i) for i in images]), or call update(list of samples)"
        )
    found = as_leaf(leaf, path)
    if not leaf_type(found, path)[1]:
        raise SchemaError(
            f"{path}: a batch needs a leading dimension, got a single {type(leaf).__name__}; "
            "make one value for all np.full(n, value), of a list of them np.stack(values), and give a list of samples to update()"
        )
    return found


def batch_length(leaves: Sequence[Any], fields: Sequence[Field]) -> int:
    """The common leading dimension of a batch's leaves, which `batch_leaf` made. Raises SchemaError where they differ."""
    lengths = {field.name: leaf_type(leaf, field.name)[1][0] for leaf, field in zip(leaves, fields, strict=True)}
    if len(set(lengths.values())) > 1:
        raise SchemaError(
            f"the leaves of a batch differ in length: {lengths}; each holds the same samples, (n, ...): "
            "stack lists of samples, np.stack(values), or give them to update()"
        )
    return int(next(iter(lengths.values())))


def _check_name(name: Any, path: str) -> None:
    if not isinstance(name, str) or not name or "/" in name or "\0" in name or name in (".", ".."):
        raise SchemaError(f"{path}: the key {name!r} cannot name a dataset; use a non-empty str without '/'")
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        raise SchemaError(f"{path}: the key {name!r} is not valid Unicode") from None


def _infer(sample: Any, metadata: Mapping[str, Any] | None, batched: bool) -> Schema:
    fields: list[Field] = []
    shapes: list[tuple[int, ...]] = []  # of the leaves as they came

    def one(leaf: Any, path: str) -> Field:
        dtype, shape, torch = leaf_type(batch_leaf(leaf, path) if batched else leaf, path)
        shapes.append(shape)
        field = Field(path, dtype, tuple(shape[1:] if batched else shape), torch)
        if len(field.shape) > _RANK:
            raise SchemaError(f"{path}: entries of {len(field.shape)} dimensions, but HDF5 allows {_RANK}; reshape them")
        if field.nbytes == 0:
            raise SchemaError(f"{path}: entries of shape {field.shape} and dtype {dtype} have no bytes")
        return field

    def walk(value: Any, path: str, depth: int) -> Any:
        if depth > _DEPTH:
            raise SchemaError(f"{path}: nested deeper than {_DEPTH} levels")
        if isinstance(value, Mapping):
            for key in value.keys():  # noqa: SIM118 - of a TensorDict, `in` goes over samples
                _check_name(key, path)
            children = [[key, walk(v, f"{path}/{key}", depth + 1)] for key, v in value.items()]
            kind = "dict"
        elif isinstance(value, (tuple, list)):
            if batched and value and all(isinstance(v, (bool, int, float, complex, np.generic)) for v in value):
                raise SchemaError(f"{path}: a {type(value).__name__} of {len(value)} numbers is no array; give np.array(values)")
            before = len(fields)
            children = [walk(v, f"{path}/{i}", depth + 1) for i, v in enumerate(value)]
            kind = "tuple" if isinstance(value, tuple) else "list"
            within = fields[before:]
            if batched and depth == 0 and type(value) is list and _are_samples(fields, shapes, len(value)):
                way = "stack them, np.stack(batch), or call" if len(fields) == len(value) else "call"
                raise SchemaError(
                    f"a list of {len(value)} alike in place of a batch: it would be a batch of {shapes[0][0]}, each a list of "
                    f"{len(value)}; if these are {len(value)} samples, {way} update(batch); if not, give tuple(batch)"
                )
            many = len(within) > _MOST_NUMBERS and not any(f.shape for f in within) and len({child[0] for child in children}) == 1
            if many and (kind == "list" or (type(value) is tuple and all(isinstance(v, (bool, int, float, complex)) for v in value))):
                ways = ("np.stack(values, 1)", "give tuple(values)") if batched else ("np.array(values)", "name its parts in a dict")
                raise SchemaError(
                    f"{path}: a {type(value).__name__} of {len(value)} would make {len(within)} fields of one number each; if it is one "
                    f"array, make it one, {ways[0]}; if not, {ways[1]}"
                )
        else:
            fields.append(one(value, path))
            return ["leaf", len(fields) - 1]
        return [kind, *children]

    structure = walk(sample, "data", 0)
    if not fields:
        raise SchemaError("a sample needs at least one array")
    if metadata is not None and not isinstance(metadata, Mapping):
        raise SchemaError(f"metadata is a dict of name -> array, not {type(metadata).__name__}")
    meta = [metadata_field(name, one(leaf, f"metadata/{name}")) for name, leaf in (metadata or {}).items()]
    return Schema(tuple(fields), tuple(sorted(meta, key=lambda f: f.name)), structure)


def _are_samples(fields: list[Field], shapes: list[tuple[int, ...]], n: int) -> bool:
    """Whether a list in place of a batch looks like n samples: more than three alike, or two or three images, or three of one dimension.

    DataLoader makes lists of pairs and triplets, so what may be two or three columns is taken for that.
    """
    m = len(fields) // max(n, 1)
    kinds = [(f.dtype, shape) for f, shape in zip(fields, shapes, strict=True)]
    if n < 2 or not m or m * n != len(fields) or any(kinds[i : i + m] != kinds[:m] for i in range(0, len(fields), m)):
        return False
    one, byte = shapes[0], fields[0].dtype == np.uint8
    image = m == 1 and len(one) == 3 and ((one[0] in (1, 3) and one[1] == one[2]) or (one[2] in (1, 3) and one[0] == one[1] and byte))
    return n > 3 or image or (n == 3 and (m > 1 or len(one) == 1))


def metadata_field(name: Any, field: Field) -> Field:
    """The field of a metadata entry, its name checked."""
    _check_name(name, "metadata")
    if name in RESERVED:
        raise SchemaError(f"metadata/{name}: the names {RESERVED} are taken; choose another")
    return field


def _match(structure: Any, value: Any, path: str, leaves: list[Any]) -> None:
    kind = structure[0]
    if kind == "leaf":
        leaves.append(value)
        return
    n = len(structure) - 1
    if kind == "dict":
        if not isinstance(value, Mapping):
            raise SchemaError(f"{path}: expected a dict of {n}, got {type(value).__name__}")
        names, found = [key for key, _ in structure[1:]], list(value.keys())
        if len(found) != n or any(name not in found for name in names):
            missing, extra = [name for name in names if name not in found], [key for key in found if key not in names]
            raise SchemaError(f"{path}: expected a dict with the keys {names}: missing {missing}, unexpected {extra}")
        for key, child in structure[1:]:
            _match(child, value[key], f"{path}/{key}", leaves)
        return
    # A tuple and a list of the same length mean the same here: torch's collate turns one into the other.
    if not isinstance(value, (tuple, list)):
        raise SchemaError(f"{path}: expected a {kind} of {n}, got {type(value).__name__}")
    if len(value) != n:
        raise SchemaError(
            f"{path}: expected a {kind} of {n}, got {len(value)} entries; give a list of samples to update(), "
            "and lists that differ in length as arrays padded to one"
        )
    for i, child in enumerate(structure[1:]):
        _match(child, value[i], f"{path}/{i}", leaves)


def _build(structure: Any, leaves: Sequence[Any]) -> Any:
    kind = structure[0]
    if kind == "leaf":
        return leaves[structure[1]]
    if kind == "dict":
        return {key: _build(child, leaves) for key, child in structure[1:]}
    children: Callable[[], Any] = lambda: (_build(child, leaves) for child in structure[1:])  # noqa: E731
    return tuple(children()) if kind == "tuple" else list(children())
