"""What a sample looks like: a nested structure of arrays <-> flat, named fields.

A leaf of the sample becomes the field `data/<path>` (`data/0`, `data/1/ids`; a bare array is
`data`). A metadata entry becomes `metadata/<name>`. `leaves` says what a leaf may be.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import SchemaError
from .leaves import KINDS, Field, are_images, batch_leaf, leaf_type

RESERVED = ("idx", "position")  # what a sample's metadata holds besides its own fields
_DEPTH = 16
_MOST_NUMBERS = 16  # in a list: who has more of them means an array
_RANK = 31  # dimensions of an entry: HDF5 has 32, one of them the rows


@dataclass(frozen=True)
class Schema:
    """The fields of a buffer and the nesting of its samples.

    data: fields of the sample, in order. metadata: fields of the metadata, sorted by name.
    structure: the nesting, as nested lists: ["leaf", i], ["tuple", child, ...],
    ["list", child, ...] or ["dict", [key, child], ...].

    >>> import numpy as np
    >>> sample = np.zeros((3, 32, 32), "uint8"), 7
    >>> schema = Schema.from_sample(sample, metadata={"logits": np.zeros(10, "float32")})
    >>> print(schema)
    Schema(data/0: u1[3, 32, 32], data/1: i8[], metadata/logits: f4[10])
    """

    data: tuple[Field, ...]
    metadata: tuple[Field, ...]
    structure: Any

    @classmethod
    def from_sample(cls, sample: Any, metadata: Mapping[str, Any] | None = None) -> Schema:
        """Return the schema of one sample (no batch dimension).

        Raises SchemaError for a list of more than 16 numbers, which is an array to its user.
        """
        return _Inference(batched=False).schema_of(sample, metadata)

    @classmethod
    def from_batch(cls, batch: Any, metadata: Mapping[str, Any] | None = None) -> Schema:
        """Return the schema of the samples of a batch, whose leaves have a leading dimension more.

        Raises SchemaError for a list of samples.
        """
        return _Inference(batched=True).schema_of(batch, metadata)

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
        """Number of the label's field: the second element of a sample. None without one."""
        return self.integer_element(1)

    def integer_element(self, i: int) -> int | None:
        """Return the field of the i-th element of a sample that is a tuple or list, if that is one
        integer or bool, of shape () or (1,)."""
        s = self.structure
        if s[0] not in ("tuple", "list") or len(s) < i + 2 or s[i + 1][0] != "leaf":
            return None
        field = self.data[s[i + 1][1]]
        whole = field.shape in ((), (1,)) and field.dtype.kind in "iub" and field.torch is None
        return int(s[i + 1][1]) if whole else None

    @functools.cached_property
    def _plain_tuple(self) -> int:
        """Length of a sample that is a tuple of arrays, the usual case; 0 for other nestings."""
        s = self.structure
        return len(s) - 1 if s[0] == "tuple" and all(child[0] == "leaf" for child in s[1:]) else 0

    def __str__(self) -> str:
        return f"Schema({', '.join(map(str, self.fields))})"

    def with_metadata(self, field: Field) -> Schema:
        """Return this schema with one more metadata field."""
        return Schema(self.data, tuple(sorted((*self.metadata, field), key=lambda f: f.name)), self.structure)

    def flatten(self, sample: Any) -> list[Any]:
        """Return the leaves of a sample or batch in field order, as they came.

        Raises SchemaError for another nesting.
        """
        if type(sample) is tuple and len(sample) == self._plain_tuple:
            return list(sample)
        leaves: list[Any] = []
        _match(self.structure, sample, "data", leaves)
        return leaves

    def flatten_metadata(self, metadata: Mapping[str, Any] | None) -> list[Any]:
        """Return metadata values in field order. Raises SchemaError for missing or extra names."""
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
        """Return the sample or batch with these leaves (the data fields, in order)."""
        if self._plain_tuple:
            return tuple(leaves)
        return _build(self.structure, leaves)

    def to_json(self) -> dict[str, Any]:
        """Return the schema as plain JSON values."""

        def one(f: Field) -> dict[str, Any]:
            return {"name": f.name, "dtype": f.dtype.str, "shape": list(f.shape), "torch": f.torch}

        return {"data": [one(f) for f in self.data], "metadata": [one(f) for f in self.metadata], "structure": self.structure}

    @classmethod
    def from_json(cls, value: Any) -> Schema:
        """Return the schema that `to_json` wrote.

        Raises SchemaError for anything else: the input may come from a hostile file.
        """
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
    # NumPy would parse, and partly evaluate, much more than these names of dtypes.
    if not re.fullmatch(r"[<|][a-zA-Z][0-9]{1,9}", str(value["dtype"])):
        raise ValueError(f"dtype {value['dtype']}")
    dtype = np.dtype(str(value["dtype"]))
    shape = tuple(value["shape"])
    if any(type(n) is not int or not 0 < n < 2**48 for n in shape) or len(shape) > _RANK:
        raise ValueError(f"shape {shape}")
    wide = dtype.itemsize > {"f": 8, "c": 16}.get(dtype.kind, 2**40)  # such differ between machines
    if dtype.kind not in KINDS or wide or dtype.itemsize == 0 or not dtype.isnative or value["torch"] not in (None, "bfloat16"):
        raise ValueError(f"dtype {value['dtype']}")
    if value["torch"] and dtype != np.uint16:
        raise ValueError(f"{value['torch']} as {dtype}")
    if math.prod(shape) * dtype.itemsize >= 2**48:
        raise ValueError(f"shape {shape}")
    return Field(str(value["name"]), dtype, shape, value["torch"])


def _children(structure: Any) -> Iterable[tuple[Any, Any]]:
    """Return the (key, child) pairs of a structure that is no leaf; keys of tuples are numbers."""
    return structure[1:] if structure[0] == "dict" else enumerate(structure[1:])


def _names(structure: Any, path: str, found: list[str], depth: int) -> None:
    """Collect the field names of a structure from a file, checking its form."""
    if depth > _DEPTH or not isinstance(structure, list):
        raise ValueError("structure")
    kind = structure[0]
    if kind == "leaf":
        if structure != ["leaf", len(found)] or type(structure[1]) is not int:
            raise ValueError("structure: leaves out of order")
        found.append(path)
        return
    if kind not in ("tuple", "list", "dict"):
        raise ValueError(f"structure: {kind!r}")
    keys = [key for key, _ in _children(structure)]
    if len(set(keys)) != len(keys):
        raise ValueError("structure: a key stands twice")
    for key, child in _children(structure):
        if kind == "dict":
            _check_name(key, path)
        _names(child, f"{path}/{key}", found, depth + 1)


def _match(structure: Any, value: Any, path: str, leaves: list[Any]) -> None:
    """Append the leaves of a value of this structure. Raises SchemaError for another nesting."""
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
    # A tuple and a list of one length mean the same here: torch's collate makes one of the other.
    elif not isinstance(value, (tuple, list)):
        raise SchemaError(f"{path}: expected a {kind} of {n}, got {type(value).__name__}")
    elif len(value) != n:
        raise SchemaError(
            f"{path}: expected a {kind} of {n}, got {len(value)} entries; give a list of samples to update(), "
            "and lists that differ in length as arrays padded to one"
        )
    for key, child in _children(structure):
        _match(child, value[key], f"{path}/{key}", leaves)


def _build(structure: Any, leaves: Sequence[Any]) -> Any:
    """Put leaves together as a value of this structure."""
    kind = structure[0]
    if kind == "leaf":
        return leaves[structure[1]]
    children = [(key, _build(child, leaves)) for key, child in _children(structure)]
    if kind == "dict":
        return dict(children)
    values = [child for _, child in children]
    return tuple(values) if kind == "tuple" else values


class _Inference:
    """Finds the schema of a sample, or of the samples of a batch."""

    def __init__(self, batched: bool) -> None:
        self._batched = batched
        self._leaves: list[Field] = []
        self._shapes: list[tuple[int, ...]] = []  # of the leaves as they came

    def schema_of(self, sample: Any, metadata: Mapping[str, Any] | None) -> Schema:
        structure = self._structure_of(sample, "data", 0)
        if not self._leaves:
            raise SchemaError("a sample needs at least one array")
        if metadata is not None and not isinstance(metadata, Mapping):
            raise SchemaError(f"metadata is a dict of name -> array, not {type(metadata).__name__}")
        data = tuple(self._leaves)
        meta = [metadata_field(name, self._field_of(leaf, f"metadata/{name}")) for name, leaf in (metadata or {}).items()]
        return Schema(data, tuple(sorted(meta, key=lambda f: f.name)), structure)

    def _field_of(self, leaf: Any, path: str) -> Field:
        dtype, shape, torch = leaf_type(batch_leaf(leaf, path) if self._batched else leaf, path)
        field = Field(path, dtype, tuple(shape[1:] if self._batched else shape), torch)
        if len(field.shape) > _RANK:
            raise SchemaError(f"{path}: entries of {len(field.shape)} dimensions, but HDF5 allows {_RANK}; reshape them")
        if field.nbytes == 0:
            raise SchemaError(f"{path}: entries of shape {field.shape} and dtype {dtype} have no bytes")
        self._shapes.append(shape)
        return field

    def _structure_of(self, value: Any, path: str, depth: int) -> Any:
        """Return the structure of a value. Appends the fields of its leaves."""
        if depth > _DEPTH:
            raise SchemaError(f"{path}: nested deeper than {_DEPTH} levels")
        if isinstance(value, Mapping):
            for key in value.keys():  # noqa: SIM118 - of a TensorDict, `in` goes over samples
                _check_name(key, path)
            return ["dict", *([key, self._structure_of(v, f"{path}/{key}", depth + 1)] for key, v in value.items())]
        if isinstance(value, (tuple, list)) and not (self._batched and are_images(value)):
            if self._batched and value and all(isinstance(v, (bool, int, float, complex, np.generic)) for v in value):
                raise SchemaError(f"{path}: a {type(value).__name__} of {len(value)} numbers is no array; give np.array(values)")
            before = len(self._leaves)
            children = [self._structure_of(v, f"{path}/{i}", depth + 1) for i, v in enumerate(value)]
            if self._batched and depth == 0 and type(value) is list:
                self._refuse_samples(len(value))
            self._refuse_numbers(value, path, children, self._leaves[before:])
            return ["tuple" if isinstance(value, tuple) else "list", *children]
        self._leaves.append(self._field_of(value, path))
        return ["leaf", len(self._leaves) - 1]

    def _refuse_samples(self, n: int) -> None:
        """Raise SchemaError if a list of n in place of a batch is one of samples."""
        if _are_samples(self._leaves, self._shapes, n):
            way = "stack them, np.stack(batch), or call" if len(self._leaves) == n else "call"
            raise SchemaError(
                f"a list of {n} alike in place of a batch: it would be a batch of {self._shapes[0][0]}, each a list of "
                f"{n}; if these are {n} samples, {way} update(batch); if not, give tuple(batch)"
            )

    def _refuse_numbers(self, value: Any, path: str, children: list[Any], fields: list[Field]) -> None:
        """Raise SchemaError if a list or tuple of many numbers is an array to its user."""
        if len(fields) <= _MOST_NUMBERS or any(f.shape for f in fields) or len({child[0] for child in children}) > 1:
            return
        numbers = type(value) is tuple and all(isinstance(v, (bool, int, float, complex)) for v in value)
        if isinstance(value, list) or numbers:
            ways = ("np.stack(values, 1)", "give tuple(values)") if self._batched else ("np.array(values)", "name its parts in a dict")
            raise SchemaError(
                f"{path}: a {type(value).__name__} of {len(value)} would make {len(fields)} fields of one number each; if it is one "
                f"array, make it one, {ways[0]}; if not, {ways[1]}"
            )


def _are_samples(fields: list[Field], shapes: list[tuple[int, ...]], n: int) -> bool:
    """Whether a list in place of a batch looks like n samples.

    These are more than three alike, two or three images, or three of one dimension. DataLoader
    makes lists of pairs and triplets: what may be two or three columns is taken for that.
    """
    m = len(fields) // max(n, 1)
    kinds = [(f.dtype, shape) for f, shape in zip(fields, shapes, strict=True)]
    if n < 2 or not m or m * n != len(fields) or any(kinds[i : i + m] != kinds[:m] for i in range(0, len(fields), m)):
        return False
    one, byte = shapes[0], fields[0].dtype == np.uint8
    image = m == 1 and len(one) == 3 and ((one[0] in (1, 3) and one[1] == one[2]) or (one[2] in (1, 3) and one[0] == one[1] and byte))
    return n > 3 or image or (n == 3 and (m > 1 or len(one) == 1))


def metadata_field(name: Any, field: Field) -> Field:
    """Return the field of a metadata entry. Raises SchemaError for a name that cannot be used."""
    _check_name(name, "metadata")
    if name in RESERVED:
        raise SchemaError(f"metadata/{name}: the names {RESERVED} are taken; choose another")
    return field


def _check_name(name: Any, path: str) -> None:
    if not isinstance(name, str) or not name or "/" in name or "\0" in name or name in (".", ".."):
        raise SchemaError(f"{path}: the key {name!r} cannot name a dataset; use a non-empty str without '/'")
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        raise SchemaError(f"{path}: the key {name!r} is not valid Unicode") from None
