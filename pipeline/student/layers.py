"""A student that begins as some of the layers of a larger model: a plain model folder, written before training.

So began DistilBERT (Sanh et al. 2019, arXiv:1910.01108, section 3) with every other layer of its teacher. The tensors
are copied byte by byte from file to file: no weight is loaded, so that the larger model need not fit into memory.
"""

import json
import logging
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from pipeline.core.config_train import StudentModel
from pipeline.core.errors import UsageError, boundary
from pipeline.student.jobs import TrainJob
from pipeline.student.weights import StoredTensor, read_header, weight_files

BASE: Final = "base"
CONFIG: Final = "config.json"
WEIGHTS: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
COPIED: Final = ("*.json", "*.jinja", "*.model", "*.tiktoken", "merges.txt", "vocab.txt", "LICENSE*", "NOTICE*")
"""What stays as it is: tokenizer, template, generation config, and the terms. No code and no pickle is copied."""
TEMPLATES: Final = "additional_chat_templates"
INDEX_LISTS: Final = ("mlp_only_layers", "moe_layers")
"""Lists in a config that name layers by number; every other list of one entry a layer is cut, see `layer_lists`."""
NO_LAYERS: Final = ("architectures", "bos_token_id", "eos_token_id", "pad_token_id", "suppress_tokens")
"""Lists that are of another kind however long they are."""
NUMBERS: Final = ("layer_idx", "layer_id", "layer_number", "layer_num")
"""What transformers' modules call their layer's number."""
WHERE: Final = "student.init.from_teacher_layers"

_LAYER: Final = re.compile(r"((?:.*\.)?layers\.)(\d+)(\..*)")

logger = logging.getLogger(__name__)


def base_folder(workdir: Path) -> Path:
    """Where the first process of a training writes the model that all of them start from."""
    return workdir / BASE


def begin(job: TrainJob, *, is_first: bool) -> TrainJob:
    """The job whose student is the plain model that `student.init` asks for, or the job as it is without one.

    The first process writes that model, unless an interrupted training did already; the others must not read it before
    that one said something that it says later.

    Raises:
        UsageError: see `write_layers`; or the larger model cannot be had from the hub.
    """
    init = job.student.init
    if init is None:
        return job
    folder = base_folder(job.workdir)
    if is_first and not folder.is_dir():
        write_layers(source_folder(job.student), init.from_teacher_layers, folder)
    return replace(job, student=job.student.model_copy(update={"model": str(folder), "revision": None, "init": None}))


def keep_base(job: TrainJob) -> None:
    """Leave the model that a training started from beside the one it became; one process does it.

    Raises:
        Incomplete: it cannot be written.
    """
    folder = base_folder(job.workdir)
    if not folder.is_dir():
        return
    from pipeline.student.saver import writing

    with writing("the model that the training began with", job.out / BASE):
        shutil.copytree(folder, job.out / BASE)


def source_folder(student: StudentModel) -> Path:
    """The folder of the larger model: its own, or the hub's files at the pinned revision.

    Raises:
        UsageError: the hub does not give it.
    """
    if student.folder is not None:
        return student.folder
    from huggingface_hub import snapshot_download

    todo = "download it once with a network and its licence accepted, or give a local folder"
    patterns = ["*.safetensors", *COPIED, f"{TEMPLATES}/*"]
    with boundary(UsageError, "the larger model cannot be had from the hub", where=student.model, todo=todo):
        return Path(snapshot_download(student.model, revision=student.revision, allow_patterns=patterns))


def write_layers(source: Path, kept: Sequence[int], out: Path) -> None:
    """Write a model of the `kept` layers (numbers from 0, rising) of the model in `source` into the new folder `out`.

    Embeddings, last norm and output layer stay. Covered is every architecture that stores its layers as
    `…layers.<number>.…` in safetensors files, one stack of them; layers beyond the config's count (for predicting
    several tokens ahead) are left out.

    Raises:
        UsageError: a layer is not there, or the model does not store its layers so.
    """
    config, text, count = read_stack(source, kept)
    headers = {file: read_header(file) for file in weight_files(source)}
    stack = _stack(source, [name for header in headers.values() for name in header], count)
    lists = layer_lists(source, text, count)
    staged = out.with_name(f".{out.name}.partial")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    _copy_settings(source, staged)
    numbers = {number: at for at, number in enumerate(kept)}
    text |= {"num_hidden_layers": len(kept), **{name: [values[at] for at in kept] for name, values in lists.items()}}
    text |= {name: [numbers[at] for at in text[name] if at in numbers] for name in INDEX_LISTS if text.get(name)}
    _write_json(staged / "config.json", config)
    _write_weights(headers, stack, numbers, staged)
    require_whole(staged)
    require_same_layers(source, staged, kept)
    staged.rename(out)
    logger.info("the student begins with layers %s of %d", list(kept), count)


def read_stack(source: Path, kept: Sequence[int]) -> tuple[dict[str, Any], dict[str, Any], int]:
    """A model's config, the part of it that describes the layers (it may be all of it), and how many there are.

    Raises:
        UsageError: it does not say, or one of `kept` is not among them.
    """
    config = _read_json(source / CONFIG)
    text = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    count = text.get("num_hidden_layers")
    if not isinstance(count, int):
        raise _no_layers(source, "its config does not say num_hidden_layers")
    if kept[-1] >= count:
        todo = f"name layers from 0 to {count - 1}"
        raise UsageError(f"layer {kept[-1]} is not there: the model has {count}", where=WHERE, todo=todo)
    return config, text, count


def layer_lists(source: Path, text: Mapping[str, Any], count: int) -> dict[str, list[Any]]:
    """The settings that have one entry a layer, as transformers sees them: what the file leaves out may follow from a
    layer's number (which ones attend to a window, say), and must not change with it.

    Raises:
        UsageError: a list has as many entries as there are layers, and neither its name nor the default of its
            architecture says whether that is why.
    """
    from transformers import AutoConfig

    todo = "give a model folder that transformers loads"
    with boundary(UsageError, "the model's config cannot be loaded", where=str(source), todo=todo):
        config = AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False).get_text_config()
        usual = type(config)()
    both = {**text, **config.to_dict()}
    return {
        name: list(values)
        for name, values in both.items()
        if isinstance(values, list | tuple)
        and len(values) == count
        and name not in (*INDEX_LISTS, *NO_LAYERS)
        and _goes_by_layer(name, usual)
    }


def _goes_by_layer(name: str, usual: Any) -> bool:
    """Whether a list of as many entries as layers has one for each.

    Args:
        usual: config of the same architecture with its defaults.
    """
    default = getattr(usual, name, None)
    if "layer" in name or "block" in name:
        return True
    if isinstance(default, list | tuple) and default:
        return bool(len(default) == usual.num_hidden_layers)
    what = f"the config's list {name!r} has as many entries as there are layers, and may go by layer or not"
    raise UsageError(what, where=WHERE, todo="begin with the whole model, or take another one")


def require_whole(folder: Path) -> None:
    """Refuse a written model that its own config does not describe: with the numbers of its layers, settings that
    depend on them may have changed their meaning.

    Raises:
        UsageError: transformers misses tensors in it, or finds more.
    """
    import torch
    from transformers import AutoModelForCausalLM

    todo = "choose layers of one kind, or begin with the whole model"
    with boundary(UsageError, "transformers cannot load the chosen layers", where=WHERE, todo=todo):
        _, found = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.bfloat16,
            device_map="meta",
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
    beyond = {name for name in found["unexpected_keys"] if _LAYER.fullmatch(name)}  # the source may hold other things
    wrong = sorted({*found["missing_keys"], *beyond, *(name for name, *_ in found["mismatched_keys"])})
    if wrong:
        what = f"the model's config does not fit the chosen layers: {', '.join(wrong[:3])}"
        raise UsageError(what, where=WHERE, todo=todo)


def require_same_layers(source: Path, folder: Path, kept: Sequence[int]) -> None:
    """Refuse a written model whose layers compute something else than they did: settings that follow from a layer's
    number (`lambda_init` of DiffLlama) are in no tensor and in no config.

    Compared are the numbers, texts and switches that each module of a layer keeps, but for its number itself.

    Raises:
        UsageError: one differs, or the layers are not found among the modules.
    """
    before, after = _layers_built(source), _layers_built(folder)
    todo = "choose layers that keep their numbers (0, 1, 2, …), or begin with the whole model"
    for number, layer in enumerate(after):
        old, new = _scalars(before[kept[number]]), _scalars(layer)
        wrong = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
        if wrong:
            told = f"{wrong[0]} is {new.get(wrong[0])!r} in place of {old.get(wrong[0])!r}"
            what = f"layer {kept[number]} would compute something else as layer {number}: {told}"
            raise UsageError(what, where=WHERE, todo=todo)


def _layers_built(folder: Path) -> Any:
    """The decoder's layers, without memory for their weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    todo = "give a model folder that transformers loads"
    with boundary(UsageError, "the model cannot be built", where=str(folder), todo=todo), torch.device("meta"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    count = config.get_text_config().num_hidden_layers
    stacks = [
        module
        for name, module in model.named_modules()
        if name.rpartition(".")[2] == "layers" and isinstance(module, torch.nn.ModuleList) and len(module) == count
    ]
    if len(stacks) != 1:
        raise _no_layers(folder, f"{len(stacks)} of its modules are a list of {count} layers")
    return stacks[0]


def _scalars(layer: Any) -> dict[str, Any]:
    return {
        f"{path}.{name}".lstrip("."): value
        for path, module in layer.named_modules()
        for name, value in vars(module).items()
        if name not in NUMBERS and _is_plain(value)
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


# ----------------------------------------------------------------------------------------------------------- weights


def _stack(source: Path, names: Sequence[str], count: int) -> str:
    """What the names of the layers' tensors begin with, up to the number."""
    found: dict[str, set[int]] = {}
    for match in filter(None, map(_LAYER.fullmatch, names)):
        found.setdefault(match[1], set()).add(int(match[2]))
    stacks = [prefix for prefix, numbers in found.items() if numbers >= set(range(count))]
    if len(stacks) != 1:
        raise _no_layers(source, f"{len(stacks)} stacks of {count} tensors' groups named …layers.<number>.…")
    return stacks[0]


def _no_layers(source: Path, why: str) -> UsageError:
    what = f"layers cannot be taken from this model: {why}"
    todo = "take a model with one stack of layers in safetensors files, or leave `init` out"
    return UsageError(what, where=str(source), todo=todo)


def _write_weights(
    headers: Mapping[Path, Mapping[str, StoredTensor]], stack: str, numbers: Mapping[int, int], out: Path
) -> None:
    """Files with the tensors that stay, under their new names, in the order in which they were stored."""
    kept = {file: _renamed(header, stack, numbers) for file, header in headers.items()}
    kept = {file: tensors for file, tensors in kept.items() if tensors}
    index: dict[str, str] = {}
    for at, (file, tensors) in enumerate(kept.items(), start=1):
        name = WEIGHTS if len(kept) == 1 else f"model-{at:05d}-of-{len(kept):05d}.safetensors"
        _copy_tensors(file, tensors, out / name)
        index |= dict.fromkeys(tensors, name)
    if len(kept) > 1:
        size = sum(tensor.bytes for tensors in kept.values() for tensor in tensors.values())
        _write_json(out / INDEX, {"metadata": {"total_size": size}, "weight_map": index})


def _renamed(header: Mapping[str, StoredTensor], stack: str, numbers: Mapping[int, int]) -> dict[str, StoredTensor]:
    """New name -> tensor in the old file."""
    kept = {}
    for name, tensor in header.items():
        match = _LAYER.fullmatch(name)
        if match is None or match[1] != stack:
            kept[name] = tensor
        elif int(match[2]) in numbers:
            kept[f"{stack}{numbers[int(match[2])]}{match[3]}"] = tensor
    return kept


def _copy_tensors(source: Path, tensors: Mapping[str, StoredTensor], out: Path) -> None:
    """A safetensors file of the bytes of another one: length of the header (u64), its JSON padded to 8 bytes, data."""
    told: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in tensors.items():
        told[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [at, at + tensor.bytes]}
        at += tensor.bytes
    header = json.dumps(told, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with source.open("rb") as file, out.open("wb") as written:
        written.write(len(header).to_bytes(8, "little") + header)
        for tensor in tensors.values():
            file.seek(tensor.start)
            _copy_bytes(file, written, tensor.bytes)


def _copy_bytes(source: Any, out: Any, count: int, chunk: int = 2**24) -> None:
    while count > 0:
        part = source.read(min(count, chunk))
        if not part:
            raise EOFError("a safetensors file is shorter than its header says")
        out.write(part)
        count -= len(part)


# ---------------------------------------------------------------------------------------------------------- settings


def _copy_settings(source: Path, out: Path) -> None:
    for pattern in COPIED:
        for file in source.glob(pattern):
            if file.is_file() and not file.name.endswith((".index.json", "adapter_config.json")):
                shutil.copyfile(file, out / file.name)
    if (source / TEMPLATES).is_dir():
        shutil.copytree(source / TEMPLATES, out / TEMPLATES)


def _read_json(path: Path) -> dict[str, Any]:
    todo = "give a model folder with config.json and safetensors files"
    with boundary(UsageError, "the larger model's config cannot be read", where=str(path), todo=todo):
        value: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return value


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")
