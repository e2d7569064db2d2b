"""Adapters on the student, through PEFT: LoRA, DoRA and rsLoRA, and the embeddings of single tokens beside them."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file

from pipeline.core.config_train import AdapterTuning, StudentModel
from pipeline.core.errors import UsageError, boundary
from pipeline.core.mistakes import nearest
from pipeline.student.needed import lm_head_error

ADAPTER_WEIGHTS: Final = "adapter_model.safetensors"
ADAPTER_CONFIG: Final = "adapter_config.json"
"""PEFT's names for them."""
ALL_LINEAR: Final = "all-linear"
"""PEFT's word for every linear layer but the output layer."""
LOCAL: Final = "local"
"""What the adapter's config calls a base that is a folder: a path would say where things lie on one machine."""


def with_adapters(model: Any, tuning: AdapterTuning, tokens: Sequence[int] = ()) -> Any:
    """The model with adapters; everything that is trained is in float32.

    Tied embeddings stay tied: modules that are trained in full are shared (`ensure_weight_tying`), and so are the rows
    of single tokens.

    Args:
        model: a plain model, whose frozen linear layers may be held in 4 bits.
        tokens: ids whose rows of the embeddings, and of an output layer that is not tied to them, are trained.

    Raises:
        UsageError: the config names modules that the model has not, or that cannot be adapted.
    """
    _require_all_found(model, tuning)
    _require_no_tied_targets(model, tuning)
    rows = {name: list(tokens) for name in token_layers(model, tuning)} if tokens else {}
    if rows and getattr(model.get_output_embeddings(), "bias", None) is not None:
        what = "the output layer has a bias, which PEFT leaves out where it trains the rows of single tokens"
        todo = "name embeddings and output layer in modules_to_save, or set train_tokens: []"
        raise UsageError(what, where="train.tuning.train_tokens", todo=todo)
    embeddings = _named(_embeddings(model).values(), tuning.modules_to_save)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=tuning.r,
        lora_alpha=tuning.alpha,
        lora_dropout=tuning.dropout,
        target_modules=_targets(tuning),
        modules_to_save=list(tuning.modules_to_save) or None,
        trainable_token_indices=rows or None,
        ensure_weight_tying=is_tied(model) and bool(embeddings),
        bias="none",
        init_lora_weights=True,
        use_rslora=tuning.rslora,
        use_dora=tuning.dora,
    )
    todo = 'name linear modules of the model in train.tuning.target_modules, or "all-linear"'
    was_tied = is_tied(model)
    with boundary(UsageError, "no adapters for these modules", where="train.tuning", todo=todo):
        adapted = get_peft_model(model, config)
    if hasattr(adapted.get_output_embeddings(), "lora_A"):
        raise lm_head_error()
    if was_tied:
        _require_tied(adapted)
    if rows:
        adapted.get_output_embeddings().bias = None  # PEFT's wrapper hides it, and TRL's fused head asks for it
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def token_layers(model: Any, tuning: AdapterTuning) -> tuple[str, ...]:
    """Names of the modules whose rows can be trained one by one: embeddings, and an output layer that is not tied.

    What is trained in full anyway is left out; of tied ones the embeddings stand for both.
    """
    names = _embeddings(model)
    full = _named(names.values(), tuning.modules_to_save)
    if is_tied(model):
        return () if full else (names["input"],)
    return tuple(name for name in names.values() if name not in full)


def is_tied(model: Any) -> bool:
    """Whether embeddings and output layer are one parameter."""
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _embeddings(model: Any) -> dict[str, str]:
    """Full names of the modules at both ends: "input", and "output" where there is one."""
    modules = {"input": model.get_input_embeddings(), "output": model.get_output_embeddings()}
    names = {id(module): name for name, module in model.named_modules()}
    return {role: names[id(module)] for role, module in modules.items() if module is not None}


def _named(modules: Iterable[str], names: Sequence[str]) -> list[str]:
    """Those modules that one of the names means: PEFT compares the ends of full names."""
    return [module for module in modules if any(f".{module}".endswith(f".{name}") for name in names)]


def _targets(tuning: AdapterTuning) -> str | list[str]:
    targets = tuning.target_modules
    return targets if isinstance(targets, str) else list(targets)


def _require_no_tied_targets(model: Any, tuning: AdapterTuning) -> None:
    """An adapter on tied embeddings would change the embeddings alone, and merging it would untie them."""
    if isinstance(tuning.target_modules, str):
        return
    names = _embeddings(model)
    if is_tied(model) and names["input"] in _named([names["input"]], tuning.target_modules):
        what = f"{names['input']} cannot have an adapter: the output layer shares its weight"
        todo = "leave it out; name it in modules_to_save to train it in full"
        raise UsageError(what, where="train.tuning.target_modules", todo=todo)


def _require_all_found(model: Any, tuning: AdapterTuning) -> None:
    """PEFT passes over names that it does not find, as long as it finds one."""
    modules = {name: module for name, module in model.named_modules() if name}
    linear = [name for name, module in modules.items() if isinstance(module, torch.nn.Linear)]
    targets, where = tuning.target_modules, "train.tuning.target_modules"
    if isinstance(targets, str):
        _require_match(targets, modules, where)
        targets = ()
    for field, names, fitting in (
        (where, targets, [name for name in linear if not _named([name], ["lm_head"])]),
        ("train.tuning.modules_to_save", tuning.modules_to_save, modules),
    ):
        missing = [name for name in names if not _named(modules, [name])]
        if missing:
            hint = nearest(missing[0].rpartition(".")[2], _endings(fitting))
            raise UsageError(f"the model has no module {missing[0]!r}", where=field, todo=hint)


def _require_match(expression: str, modules: Iterable[str], where: str) -> None:
    """A text is "all-linear", or for PEFT a regular expression of full names."""
    if expression == ALL_LINEAR:
        return
    todo = f'give a list of names, "{ALL_LINEAR}", or an expression such as ".*[.](q_proj|v_proj)"'
    with boundary(UsageError, f"{expression!r} is no regular expression", where=where, todo=todo):
        matches = re.compile(expression).fullmatch
    if not any(map(matches, modules)):
        raise UsageError(f"no module's full name matches {expression!r}", where=where, todo=todo)


def _endings(names: Iterable[str]) -> list[str]:
    """Last parts of full names, but the numbers of layers."""
    last = {name.rpartition(".")[2] for name in names}
    return sorted(name for name in last if not name.isdigit())


def _require_tied(adapted: Any) -> None:
    """Refuse what PEFT would untie: embeddings and output layer would go different ways.

    Raises:
        UsageError: only one of them is trained, or each on its own.
    """
    ends = [adapted.get_input_embeddings(), adapted.get_output_embeddings()]
    trained = [[id(parameter) for parameter in end.parameters() if parameter.requires_grad] for end in ends]
    if trained[0] != trained[1]:
        what = "embeddings and output layer share one weight, and PEFT cannot train it so that they still do"
        raise UsageError(what, where="train.tuning", todo="leave both out of modules_to_save and target_modules")


# ------------------------------------------------------------------------------------------------------------- saving


def write_adapter(adapted: Any, student: StudentModel, folder: Path) -> None:
    """Write the adapter in PEFT's form, for use on top of the base.

    The base is named by its hub id and revision; of a folder nothing is told, see `LOCAL`.
    """
    folder.mkdir()
    state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    # Copies, since a tied weight has two names in it, and PEFT looks for both.
    tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in sorted(state.items())}
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = adapted.peft_config["default"].to_dict()
    config |= {
        "base_model_name_or_path": student.model if student.folder is None else LOCAL,
        "revision": student.revision,
        "inference_mode": True,
    }
    text = json.dumps(config, indent=2, sort_keys=True, default=_sorted)
    (folder / ADAPTER_CONFIG).write_text(text + "\n", "utf-8")


def _sorted(value: Any) -> list[str]:
    """PEFT keeps names in sets."""
    if isinstance(value, set):
        return sorted(value)
    raise TypeError(f"no JSON form: {type(value).__name__}")


def merged(adapted: Any) -> Any:
    """The plain model, in float32 on the CPU: adapters are added to weights that are not rounded yet."""
    return adapted.to(device="cpu", dtype=torch.float32).merge_and_unload()
