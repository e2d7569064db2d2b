"""What a local model is, file by file: digests of its weights, its tokenizer and its chat template, for manifests."""

import hashlib
import json
from pathlib import Path
from typing import Final

from pipeline.core.config_server import LocalServer
from pipeline.core.lineage import DigestCache, digest_json, model_files
from pipeline.core.stage import Json
from pipeline.core.targets import tokenizer_digest
from pipeline.teacher.request import model_folder

WEIGHTS: Final = frozenset({".safetensors", ".bin", ".pt", ".pth", ".gguf"})
TEMPLATE_FILE: Final = "chat_template.jinja"
TOKENIZER_CONFIG: Final = "tokenizer_config.json"


def hashes_of(model: LocalServer, data: Path) -> dict[str, Json]:
    """64 hex digits each; None where the folder has none.

    `weights` is over the digests of their files by name, which are remembered from the model's identity;
    `chat_template` over the template's text, wherever it stands.

    Args:
        data: the data folder, whose cache remembers the digests.

    Raises:
        UsageError: the folder is missing, or the hub cannot be reached.
    """
    folder = model_folder(model)
    cache = DigestCache(data / "cache" / "digests.json")
    files = [path for path in model_files(folder) if path.suffix in WEIGHTS]
    weights: dict[str, Json] = {path.relative_to(folder).as_posix(): cache.sha256(path) for path in files}
    template = chat_template(folder)
    return {
        "weights": digest_json(weights) if weights else None,
        "tokenizer": tokenizer_digest(folder),
        "chat_template": None if template is None else hashlib.sha256(template.encode()).hexdigest(),
    }


def chat_template(folder: Path) -> str | None:
    """The template of a model folder: its own file first, as loaders do; None: it has none, or several under names."""
    own, config = folder / TEMPLATE_FILE, folder / TOKENIZER_CONFIG
    if own.is_file():
        return own.read_text("utf-8", "replace")
    try:
        said = json.loads(config.read_text("utf-8")).get("chat_template")
    except (OSError, ValueError, AttributeError):
        return None
    return said if isinstance(said, str) else None
