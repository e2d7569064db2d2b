"""What a training needs beside its rows, as far as the config and a model's folder tell: packages and layers."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Final

from pipeline.core.config_train import QloraTuning, StudentModel, TrainConfig
from pipeline.core.errors import UsageError
from pipeline.student.layers import CONFIG, read_stack
from pipeline.student.trackers import require_trackers


@dataclass(frozen=True, slots=True)
class Package:
    """A package that an option needs.

    Attributes:
        module: name under which it is imported.
        what: what is said where it is missing.
        where: the option.
        todo: how it is installed, or done without.
    """

    module: str
    what: str
    where: str
    todo: str

    def require(self) -> None:
        """Look for it; nothing is imported.

        Raises:
            UsageError: it is not installed.
        """
        if find_spec(self.module) is None:
            raise self.error()

    def error(self) -> UsageError:
        """What is said where it is missing."""
        return UsageError(self.what, where=self.where, todo=self.todo)


BITSANDBYTES: Final = Package(
    "bitsandbytes",
    "QLoRA needs the package bitsandbytes",
    "train.tuning",
    "pip install bitsandbytes, or set train.tuning.kind: lora",
)
LIGER: Final = Package(
    "liger_kernel",
    "Liger's kernels need the package liger-kernel",
    "train.liger",
    "pip install liger-kernel, or set train.liger: false",
)
FLASH_ATTENTION: Final = Package(
    "flash_attn",
    "the package flash-attn is not installed",
    "train.attention: flash_attention_2",
    "pip install flash-attn (it is compiled for your CUDA and torch), or set train.attention: sdpa",
)


def lm_head_error() -> UsageError:
    """The error for adapters on the output layer."""
    what = "lm_head cannot have an adapter: the loss reads its weight directly, so the adapter would never be trained"
    return UsageError(what, where="train.tuning.target_modules", todo="leave it out, or name it in modules_to_save")


def lacking(train: TrainConfig, student: StudentModel) -> list[UsageError]:
    """What the training would refuse to begin for, one error for each; loads neither torch nor a weight.

    Not covered: a missing GPU, packages that are there and do not work, and the layers of a model from the hub.
    """
    found = []
    for require in _requirements(train, student):
        try:
            require()
        except UsageError as error:
            found.append(error)
    return found


def _requirements(train: TrainConfig, student: StudentModel) -> Iterator[Callable[[], object]]:
    for name in train.trackers:
        yield partial(require_trackers, [name])
    if isinstance(train.tuning, QloraTuning):
        yield BITSANDBYTES.require
    if train.liger:
        yield LIGER.require
    if train.attention == "flash_attention_2":
        yield FLASH_ATTENTION.require
    if student.init is not None and student.folder is not None and (student.folder / CONFIG).is_file():
        yield partial(read_stack, student.folder, student.init.from_teacher_layers)
