"""How large a model is, read from the headers of its safetensors files: no weight is loaded."""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Weights:
    """Parameters and bytes of the stored tensors. A tied embedding is stored once, so it counts once; in a quantised
    checkpoint packed values count as stored."""

    parameters: int
    bytes: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a safetensors file.

    Attributes:
        dtype: safetensors' name of its number format ("F32", "BF16").
        start: of its bytes in the file.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    bytes: int


def stored_weights(folder: Path) -> Weights | None:
    """The size of the model in a folder; None where it holds no safetensors file."""
    files = weight_files(folder)
    if not files:
        return None
    tensors = [tensor for file in files for tensor in read_header(file).values()]
    return Weights(sum(math.prod(tensor.shape) for tensor in tensors), sum(tensor.bytes for tensor in tensors))


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers loads. A folder may hold the same weights in another layout beside them
    (`consolidated.safetensors`), which must not count."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if index.is_file():
        names: dict[str, str] = json.loads(index.read_text("utf-8"))["weight_map"]
        return [folder / name for name in sorted(set(names.values()))]
    return sorted(folder.glob("*.safetensors"))


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file by name, in the order of their bytes. The file starts with the header's length
    (u64) and its JSON."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    tensors = {name: _tensor(8 + length, told) for name, told in header.items()}
    return dict(sorted(tensors.items(), key=lambda item: item[1].start))


def number_formats(folder: Path) -> dict[str, str]:
    """Each stored tensor's number format, in safetensors' names; empty where the folder holds no safetensors file."""
    return {name: tensor.dtype for file in weight_files(folder) for name, tensor in read_header(file).items()}


def _tensor(data: int, told: dict[str, Any]) -> StoredTensor:
    start, end = told["data_offsets"]
    return StoredTensor(told["dtype"], tuple(told["shape"]), data + start, end - start)
