"""How models and tokenizers are loaded: no code of their own is run, and no pickle is opened."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.core.errors import UsageError, boundary

PICKLES = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")


@contextmanager
def loading(what: str, *, model: str, todo: str) -> Iterator[None]:
    """Turn whatever goes wrong while something of a model is loaded into `UsageError`.

    Every call inside passes `trust_remote_code=False`: left out, transformers asks on the terminal whether to run it.

    Args:
        what: what failed, one sentence.
        model: folder or hub id.
        todo: what to do about it, if the model does not bring code of its own.
    """
    with boundary(UsageError, what, where=model, todo=todo):
        try:
            yield
        except ValueError as error:
            if "trust_remote_code" not in str(error):
                raise
            why = f"{what}: it needs code from its own repository, and trust_remote_code is never used"
            fix = "take a model whose architecture transformers itself has: foreign code would run with your rights"
            raise UsageError(why, where=model, todo=fix) from error


def require_safetensors(model: str) -> None:
    """Refuse a folder whose weights are pickled only: opening a pickle runs whatever its maker put into it.

    A hub id is not looked at: transformers refuses it when `use_safetensors=True` finds none.

    Raises:
        UsageError: it has no safetensors file, and pickles.
    """
    folder = Path(model)
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    pickles = sorted(file.name for pattern in PICKLES for file in folder.glob(pattern))
    if pickles:
        what = f"the weights are pickled ({pickles[0]}), and opening a pickle can run code"
        todo = (
            "if you trust their maker, convert them once: AutoModelForCausalLM.from_pretrained(folder, "
            "use_safetensors=False).save_pretrained(folder), then remove the pickles"
        )
        raise UsageError(what, where=model, todo=todo)
