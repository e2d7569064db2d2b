"""The memory that a training will need, estimated before a weight is loaded: beside what PyTorch really keeps."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline.core.config_train import StudentModel
from pipeline.core.errors import UsageError
from pipeline.student.jobs import TrainJob
from pipeline.student.memory import GIB, MemoryEstimate, device_memory, estimate
from tests.support import cli_env
from tests.tiny_models import make_tiny_model
from tests.training_rows import small_config

CPU = torch.device("cpu")
ROWS, LONGEST = 4, 64
ALONE = {"WORLD_SIZE": "1"}
SHARDED = {"ACCELERATE_USE_FSDP": "true"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


def job_on(model: Path, *, world_size: int = 1, **changes: Any) -> TrainJob:
    settings = {"micro_batch_size": ROWS, "batch_size": ROWS * world_size, **changes}
    return TrainJob(small_config(**settings), StudentModel(model=str(model)), model, model, model, world_size, "test")


def estimated(model: Path, environ: dict[str, str] | None = None, **changes: Any) -> MemoryEstimate:
    return estimate(
        job_on(model, **changes), longest=LONGEST, device=CPU, environ=ALONE if environ is None else environ
    )


def parameters_of(model: Path) -> int:
    return sum(parameter.numel() for parameter in LlamaForCausalLM.from_pretrained(model).parameters())


class TestTheModelsPart:
    def test_full_fine_tuning_holds_four_numbers_a_weight(self, model: Path) -> None:
        found, size = estimated(model), 4 * parameters_of(model)
        assert (found.dtype, found.weights, found.gradients, found.optimizer) == ("float32", size, size, 2 * size)

    def test_adapters_need_gradients_for_themselves_only(self, model: Path) -> None:
        from pipeline.student.adapters import with_adapters
        from pipeline.student.initial import count_parameters

        job = job_on(model, tuning={"kind": "lora", "r": 4, "train_tokens": []})
        tuning: Any = job.train.tuning
        _, adapters = count_parameters(with_adapters(LlamaForCausalLM.from_pretrained(model), tuning))
        found = estimate(job, longest=LONGEST, device=CPU, environ=ALONE)
        assert (found.gradients, found.optimizer) == (4 * adapters, 8 * adapters)
        assert found.weights == 4 * (parameters_of(model) + adapters)

    @pytest.mark.parametrize(("double", "bits"), [(False, 4.5), (True, 4.127)])
    def test_qlora_holds_linear_layers_in_four_bits(self, model: Path, double: bool, bits: float) -> None:
        plain = estimated(model, tuning={"kind": "lora", "r": 4})
        found = estimated(model, tuning={"kind": "qlora", "r": 4, "double_quant": double})
        linear = 2 * (4 * 64 * 64 + 3 * 64 * 128)  # q, k, v, o and gate, up, down of two layers
        assert plain.weights - found.weights == pytest.approx(linear * (32 - bits) / 8, abs=1)

    def test_bfloat16_arithmetic_copies_the_weights_it_multiplies(self, model: Path) -> None:
        assert estimated(model).copies == 0
        linear, head = 2 * (4 * 64 * 64 + 3 * 64 * 128), LlamaConfig.from_pretrained(model).vocab_size * 64
        assert estimated(model, precision="bfloat16").copies == 2 * (linear + head)
        assert estimated(model, precision="bfloat16", weights="bfloat16").copies == 0

    def test_layers_in_four_bits_are_not_copied(self, model: Path) -> None:
        head = LlamaConfig.from_pretrained(model).vocab_size * 64
        found = estimated(model, precision="bfloat16", tuning={"kind": "qlora", "r": 4})
        assert (found.dtype, found.copies) == ("float32", 2 * head)

    def test_fsdp_divides_it_and_ddp_does_not(self, model: Path) -> None:
        one = estimated(model)
        sharded, whole = (estimated(model, environ, world_size=4) for environ in (SHARDED, {}))
        assert (sharded.weights, sharded.gradients) == (one.weights // 4, one.gradients // 4)
        assert sharded.optimizer == one.optimizer // 4
        assert sharded.copies > 0, "layers are gathered while they are used"
        assert (whole.weights, whole.optimizer) == (one.weights, one.optimizer)
        assert whole.gradients == 2 * one.gradients, "DDP's buckets"

    def test_adapters_that_cannot_be_made(self, model: Path) -> None:
        with pytest.raises(UsageError, match="the model has no module 'no_such_module'"):
            estimated(model, tuning={"kind": "lora", "target_modules": ["no_such_module"]})


class TestTheBatchesPart:
    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    @pytest.mark.parametrize("precision", ["float32", "bfloat16"])
    @pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
    def test_is_what_pytorch_keeps(
        self, tmp_path: Path, attention: str, precision: str, heads: tuple[int, int]
    ) -> None:
        folder = make_deeper(tmp_path / "model", *heads)
        found = estimated(folder, attention=attention, precision=precision)
        kept = kept_bytes(folder, attention, precision)
        assert 1 / 1.5 < found.activations / kept < 1.5

    def test_grows_with_rows_and_their_length(self, model: Path) -> None:
        found = estimated(model)
        assert estimated(model, micro_batch_size=2).activations == found.activations // 2
        longer = estimate(job_on(model), longest=2 * LONGEST, device=CPU, environ=ALONE)
        assert longer.activations == 2 * found.activations

    def test_is_smaller_where_layers_are_computed_again(self, tmp_path: Path) -> None:
        folder = make_deeper(tmp_path / "model", 4, 4)
        assert estimated(folder, gradient_checkpointing=True).activations < estimated(folder).activations / 2


def make_deeper(folder: Path, heads: int, keys: int) -> Path:
    """A model of eight layers, the tokenizer aside."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=8,
        num_attention_heads=heads,
        num_key_value_heads=keys,
        max_position_embeddings=512,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def kept_bytes(folder: Path, attention: str, precision: str) -> int:
    """Bytes that a forward pass through the decoder keeps for the backward pass, the weights and their copies aside."""
    model = LlamaForCausalLM.from_pretrained(folder, attn_implementation=attention, dtype=torch.float32)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    shapes = {parameter.shape for parameter in model.parameters() if parameter.dim() == 2}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        is_copy = tensor.shape in shapes or tensor.t().shape in shapes if tensor.dim() == 2 else False
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and not is_copy:
            kept[storage.data_ptr()] = storage  # holds it, so that no other gets its address
        return tensor

    autocast = torch.autocast("cpu", torch.bfloat16) if precision == "bfloat16" else nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        model.model(input_ids=torch.randint(0, 64, (ROWS, LONGEST)), use_cache=False)
    return sum(storage.nbytes() for storage in kept.values())


class TestTheDevice:
    def test_memory_is_that_of_the_machine_or_the_container(self) -> None:
        found = device_memory(CPU)
        assert found is not None and GIB / 4 < found < 2**50

    def test_a_cpus_memory_is_shared_by_its_processes(self, model: Path) -> None:
        one, two = estimated(model), estimated(model, {"LOCAL_WORLD_SIZE": "2"}, world_size=2)
        assert (one.processes, two.processes) == (1, 2)
        assert one.available is not None and one.share == one.total / one.available
        assert two.share == 2 * two.total / one.available

    def test_it_is_said_in_one_line(self, model: Path) -> None:
        found = estimated(model)
        size = f"{found.weights / 1e6:,.1f} MB"
        assert str(found).startswith(f"weights float32 {size}, gradients {size}, optimizer ")
        assert str(found).endswith(f"{found.total / GIB:.1f} of {(found.available or 0) / GIB:.1f} GiB")
        assert set(found.facts()) >= {"dtype", "weights", "gradients", "optimizer", "activations", "logits", "total"}


MEASURE = """
import sys, threading, time
from pathlib import Path
import torch
from transformers import LlamaConfig, LlamaForCausalLM
import pipeline.student.trainer as trainer
from tests.training_rows import *
from pipeline.student.memory import estimate

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

peak, found = [0], {}
def watch():
    while True:
        peak[0] = max(peak[0], resident())
        time.sleep(0.005)

threading.Thread(target=watch, daemon=True).start()
save = trainer.save
def saved(*arguments):
    found["peak"] = peak[0]  # of the training, not of saving
    save(*arguments)
trainer.save = saved
folder = Path(sys.argv[1])
job, result = train_here(folder / "t", folder / "model", folder / "dataset", max_steps=2, max_length=512)
needed = estimate(job, longest=result["metrics"]["checks"]["longest"], device=torch.device("cpu"))
print("ratio", needed.total / found["peak"])
"""


@pytest.mark.soak
@pytest.mark.parametrize("words", [8, 60])
def test_the_peak_of_a_process_is_near_the_estimate(tmp_path: Path, words: int) -> None:
    """A model of 50 million parameters."""
    from pipeline.core.record import Message
    from tests.training_rows import sum_row, write_dataset

    make_tiny_model(tmp_path / "model")
    config = LlamaConfig.from_pretrained(tmp_path / "model")
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 640, 1760, 10
    config.num_attention_heads, config.num_key_value_heads, config.head_dim = 10, 10, 64
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    rows = [sum_row(number, completion=(Message("assistant", "word " * words),)) for number in range(24)]
    write_dataset(tmp_path / "dataset", rows)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], env=cli_env(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ratio = float(done.stdout.split("ratio")[-1])
    assert 1 / 1.5 < ratio < 1.5
