"""How large a model is, read from the headers of its safetensors files: no weight is loaded."""

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Weights:
    """Parameters and bytes of the stored tensors. A tied embedding is stored once, so it counts once; in a quantised
    checkpoint packed values count as stored."""

    parameters: int
    bytes: int


def stored_weights(folder: Path) -> Weights | None:
    """The size of the model in a folder; None where it holds no safetensors file."""
    files = _weight_files(folder)
    if not files:
        return None
    tensors = [tensor for file in files for tensor in _header(file)]
    return Weights(sum(parameters for parameters, _ in tensors), sum(size for _, size in tensors))


def _weight_files(folder: Path) -> list[Path]:
    """The files that transformers loads. A folder may hold the same weights in another layout beside them
    (`consolidated.safetensors`), which must not count."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if index.is_file():
        names: dict[str, str] = json.loads(index.read_text("utf-8"))["weight_map"]
        return [folder / name for name in sorted(set(names.values()))]
    return sorted(folder.glob("*.safetensors"))


def _header(path: Path) -> list[tuple[int, int]]:
    """(parameters, bytes) of each tensor. A file starts with the header's length (u64) and its JSON."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return [
        (math.prod(tensor["shape"]), tensor["data_offsets"][1] - tensor["data_offsets"][0])
        for tensor in header.values()
    ]
