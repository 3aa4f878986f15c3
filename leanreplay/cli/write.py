"""Commands that write a file: merge, resize, export."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ..buffers.base import DataBuffer
from ..buffers.registry import open_buffer
from ..errors import ArgumentError, DependencyError, ExistsError
from ..merge import merge
from ..storage import system

PIECE = 1024  # samples read in one go


def add_commands(commands: Any) -> None:
    """Add the parsers of these commands."""
    join = commands.add_parser("merge", help="make one exact buffer of several streams' buffers")
    join.add_argument("files", nargs="+")
    join.add_argument("--out", required=True)
    join.set_defaults(run=run_merge)

    size = commands.add_parser("resize", help="change the number of rows; fewer keep a uniform sample")
    size.add_argument("file")
    size.add_argument("rows", type=int)
    size.set_defaults(run=run_resize)

    export = commands.add_parser("export", help="write the samples in another form")
    export.add_argument("file")
    export.add_argument("--to", choices=sorted(FORMATS), required=True)
    export.add_argument("--out", required=True, help="a file that does not exist yet; a folder for folder-of-images and hf")
    export.set_defaults(run=run_export)


def run_merge(arguments: argparse.Namespace) -> int:
    with merge(arguments.files, arguments.out) as merged:
        print(f"{arguments.out}: {len(merged):,} of {merged.seen:,} samples")
    return 0


def run_resize(arguments: argparse.Namespace) -> int:
    with open_buffer(arguments.file, mode="r+") as buffer:
        buffer.resize(arguments.rows)
        print(f"{arguments.file}: {buffer.max_size:,} rows, {len(buffer):,} held")
    return 0


def run_export(arguments: argparse.Namespace) -> int:
    if os.path.lexists(arguments.out):
        raise ExistsError(f"{arguments.out} exists; give --out another name, or remove it")
    with open_buffer(arguments.file) as buffer, system.storage_errors(f"writing {arguments.out}"):
        if not len(buffer):
            raise ArgumentError(f"{arguments.file} holds no samples: there is nothing to export")
        FORMATS[arguments.to](buffer, arguments.out)
        print(f"{arguments.out}: {len(buffer):,} samples")
    return 0


def columns(buffer: DataBuffer) -> dict[str, Any]:
    """Return every field, and positions, of all samples in the order of rows: name -> (n, ...)."""
    pieces = [dict(leaves(buffer, rows)) for rows in np.array_split(buffer.get_metadata("idx"), -(-len(buffer) // PIECE))]
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def leaves(buffer: DataBuffer, rows: Any) -> Iterator[tuple[str, Any]]:
    """Yield (name, values) of the samples in these rows, named as in the file."""
    batch, metadata = buffer.get(rows)
    if buffer.schema is not None:
        yield from zip((field.name for field in buffer.schema.data), map(np.asarray, buffer.schema.flatten(batch)), strict=True)
    yield from ((f"metadata/{name}", values) for name, values in metadata.items() if name not in ("idx", "position"))
    yield "position", metadata["position"]


def to_npz(buffer: DataBuffer, out: str) -> None:
    with open(out, "xb") as file:
        np.savez(file, **columns(buffer))


def to_safetensors(buffer: DataBuffer, out: str) -> None:
    needed("safetensors.numpy", "safetensors").save_file(columns(buffer), out)


def to_hf(buffer: DataBuffer, out: str) -> None:
    found = {name.replace("/", "."): list(values) for name, values in columns(buffer).items()}
    needed("datasets", "datasets").Dataset.from_dict(found).save_to_disk(out)


def to_images(buffer: DataBuffer, out: str) -> None:
    """One PNG a sample, named by row, in a folder for each label."""
    image = needed("PIL.Image", "pillow")
    for (pixels, label), meta in buffer:
        array = np.asarray(pixels)
        array = np.moveaxis(array, 0, -1) if array.ndim == 3 and array.shape[0] in (1, 3, 4) else array
        if array.dtype != np.uint8 or array.ndim not in (2, 3):
            raise ArgumentError(f"folder-of-images takes samples (uint8 image, label); here an image is {array.dtype}{list(array.shape)}")
        folder = os.path.join(out, str(np.asarray(label).item()))
        os.makedirs(folder, exist_ok=True)
        image.fromarray(array[..., 0] if array.shape[-1:] == (1,) else array).save(os.path.join(folder, f"{int(meta['idx'])}.png"))


def needed(module: str, package: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        raise DependencyError(f"this needs {package}, which is not installed: pip install {package}") from None


FORMATS: dict[str, Callable[[DataBuffer, str], None]] = {
    "npz": to_npz,
    "safetensors": to_safetensors,
    "hf": to_hf,
    "folder-of-images": to_images,
}
