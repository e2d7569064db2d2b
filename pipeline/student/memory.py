"""How much memory a training will need, from the model's shapes alone: no weight is loaded.

An estimate for choosing batch sizes and machines, per process, without what an allocator keeps of what was freed. The
activations follow the way of counting of Korthikanti et al. (2022, arXiv:2205.05198, section 4.1), tensor by tensor,
for the decoder layers of transformers (RMSNorm, rotary embeddings, gated MLP) instead of GPT's. Not covered: the state
of attention that is none (state-space layers), images, and what saving the model takes at the end.
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoModelForCausalLM

from pipeline.core.config_train import AdapterTuning, QloraTuning
from pipeline.core.errors import UsageError, boundary
from pipeline.core.machine import cgroup_memory, read_setting, usable_memory
from pipeline.core.stage import Json
from pipeline.student.adapters import with_adapters
from pipeline.student.arguments import schedule
from pipeline.student.initial import count_parameters, held_dtype, load_config
from pipeline.student.jobs import TrainJob
from pipeline.student.sft import MOST_LOGITS

RUNTIME: Final = {"cpu": 700 * 2**20, "cuda": 1 * 2**30}
"""Bytes that torch, transformers and TRL take before a model is there: measured on a CPU; of a GPU the context of CUDA
with its libraries, from their documentation."""
QLORA_BITS: Final = {False: 4.5, True: 4.127}
"""Bits a weight with and without double quantisation: 32-bit scales of blocks of 64, or these in 8 bits (Dettmers et
al. 2023, arXiv:2305.14314, section 3)."""
HEAD_TOKENS: Final = 4096
HEAD_VOCABULARY: Final = 32768
"""Tokens and vocabulary entries of a tile of TRL's fused output layer (trl/kernels/chunked_logprob.py)."""
MB: Final = 10**6
GIB: Final = 2**30

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """What one process holds, in bytes.

    Attributes:
        dtype: number format of the weights that are trained or held beside those in 4 bits.
        weights: as they are held; what is sharded counts as this process's part.
        copies: of the weights in the number format of the arithmetic, and whole layers that are gathered from shards.
        gradients: of what is trained, with DDP's buckets.
        optimizer: AdamW's two averages of what is trained.
        activations: of the largest micro-batch, between its forward and its backward pass.
        logits: of as many tokens as are held at once.
        step: that the optimizer needs beside the gradients while it makes its step.
        runtime: of the libraries.
        device: "cpu" or "cuda".
        processes: that share the device's memory.
        available: bytes of the device; None where nobody says.
    """

    dtype: str
    weights: int
    copies: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    step: int
    runtime: int
    device: str
    processes: int
    available: int | None

    @property
    def model(self) -> int:
        """Bytes of the model and its training at their highest, without the libraries.

        Gradients and activations are counted together: those of earlier micro-batches are there when the next one
        comes, and what a CPU's allocator gave once it does not get back in whole pieces.
        """
        held = self.weights + self.copies + self.gradients + self.optimizer
        return held + max(self.activations + self.logits, self.step)

    @property
    def total(self) -> int:
        """Bytes of one process at their highest."""
        return self.model + self.runtime

    @property
    def share(self) -> float | None:
        """Share of the device's memory that all its processes take; above 1 they do not fit."""
        return None if self.available is None else self.total * self.processes / self.available

    def facts(self) -> dict[str, Json]:
        """For the manifest: bytes by part. What the device has is no fact of the training."""
        names = ("weights", "copies", "gradients", "optimizer", "activations", "logits", "step", "runtime", "total")
        parts: dict[str, Json] = {name: getattr(self, name) for name in names}
        return {"dtype": self.dtype, **parts, "device": self.device}

    def __str__(self) -> str:
        """`weights float32 2.1 MB, …: 1.2 of 16.0 GiB`."""
        named = {
            f"weights {self.dtype}": self.weights + self.copies,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "activations": self.activations,
            "logits": self.logits,
        }
        parts = ", ".join(f"{name} {value / MB:,.1f} MB" for name, value in named.items())
        times = "" if self.processes == 1 else f" x {self.processes} processes"
        of = "" if self.available is None else f" of {self.available / GIB:.1f}"
        return f"{parts}; with the libraries {self.total / GIB:.1f}{times}{of} GiB"


def estimate(
    job: TrainJob, *, longest: int, device: torch.device, environ: Mapping[str, str] = os.environ
) -> MemoryEstimate:
    """What a process of this training holds on its device.

    Args:
        longest: tokens of the longest row; every micro-batch is taken to be as long.
        environ: of a process that Accelerate started: whether it shards, and how many processes share a machine.

    Raises:
        UsageError: the student's config cannot be loaded, or its adapters cannot be made.
    """
    train, config = job.train, load_config(job)
    dtype = held_dtype(train, config)
    shapes = Shapes.of(job, config)
    is_sharded = environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true", "yes")
    parts = job.world_size if is_sharded else 1
    trained = torch.float32 if isinstance(train.tuning, AdapterTuning) else dtype
    gradients = shapes.trainable * trained.itemsize
    plan = schedule(train, steps=1, world_size=job.world_size)
    computes = 2 if train.precision == "bfloat16" else 4
    packed = isinstance(train.tuning, QloraTuning)
    layer = Layer.of(config.get_text_config(), held=dtype.itemsize, computes=computes)
    attends = train.attention == "eager"
    buckets = gradients if job.world_size > 1 and not is_sharded else 0
    is_cpu = device.type == "cpu"
    return MemoryEstimate(
        dtype=str(dtype).removeprefix("torch."),
        weights=_held(job, shapes, dtype) // parts,
        copies=shapes.copied(held=dtype.itemsize, computes=computes, is_sharded=is_sharded, packed=packed),
        gradients=gradients // parts + buckets,
        optimizer=2 * gradients // parts,
        activations=plan.micro_batch_size
        * longest
        * shapes.activations(layer, longest if attends else 0, keeps=not train.gradient_checkpointing),
        logits=_logits(plan.micro_batch_size * longest, shapes.vocabulary, is_cpu and not is_sharded),
        step=(shapes.largest * 8 if is_cpu else gradients) // parts,
        runtime=RUNTIME["cpu" if is_cpu else "cuda"],
        device=device.type,
        processes=int(environ.get("LOCAL_WORLD_SIZE", str(job.world_size))) if is_cpu else 1,
        available=device_memory(device),
    )


def device_memory(device: torch.device) -> int | None:
    """Bytes of a device's memory: of a CPU what our cgroup lets us have of the machine's."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type == "cpu":
        return usable_memory(read_setting(Path("/proc/meminfo")), cgroup_memory())[0] or None
    return None


# ------------------------------------------------------------------------------------------------------------ shapes


@dataclass(frozen=True, slots=True)
class Shapes:
    """What the model's modules say of their sizes, in numbers (not bytes).

    Attributes:
        parameters: of the base; tied ones count once.
        trainable: of what is trained, adapters included.
        linear: weights of the linear layers within the decoder's layers.
        multiplied: weights that take part in a matrix product: those and the output layer.
        largest: of one trained parameter.
        layers: of the decoder.
        layer: parameters of one layer.
    """

    parameters: int
    trainable: int
    linear: int
    multiplied: int
    largest: int
    layers: int
    layer: int
    hidden: int
    vocabulary: int

    @classmethod
    def of(cls, job: TrainJob, config: Any) -> "Shapes":
        """Build the model without memory for its weights ("meta"), with its adapters.

        Raises:
            UsageError: transformers cannot build it, or PEFT its adapters.
        """
        text = config.get_text_config()
        todo = "give a model folder (or hub id and revision) that transformers loads as a causal language model"
        building = boundary(UsageError, "the student cannot be built", where=job.student.model, todo=todo)
        with building, torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        parameters, _ = count_parameters(model)
        head = model.get_output_embeddings()
        linear = sum(
            module.weight.numel()
            for module in model.modules()
            if isinstance(module, torch.nn.Linear) and module is not head
        )
        embedded = sum(each.weight.numel() for each in {model.get_input_embeddings(), head} - {None})
        tied = head is not None and head.weight is model.get_input_embeddings().weight
        outside = embedded // 2 if tied else embedded
        if isinstance(job.train.tuning, AdapterTuning):
            with torch.device("meta"):
                model = with_adapters(model, job.train.tuning)
        trained = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
        return cls(
            parameters=parameters,
            trainable=sum(trained),
            linear=linear,
            multiplied=linear + (0 if head is None else head.weight.numel()),
            largest=max(trained, default=0),
            layers=int(text.num_hidden_layers),
            layer=(parameters - outside) // int(text.num_hidden_layers),
            hidden=int(text.hidden_size),
            vocabulary=int(text.vocab_size),
        )

    def copied(self, *, held: int, computes: int, is_sharded: bool, packed: bool) -> int:
        """Bytes of the weights' copies: autocast's, which live from the forward to the backward pass; under FSDP2 of
        two layers (one is gathered while the other is used), the embeddings and the output layer. Layers in 4 bits
        (`packed`) are unpacked for each product and not kept."""
        if is_sharded:
            return computes * (2 * self.layer + max(0, self.parameters - self.layers * self.layer))
        kept = self.multiplied - self.linear if packed else self.multiplied
        return computes * kept if computes < held else 0

    def activations(self, layer: "Layer", attended: int, *, keeps: bool) -> int:
        """Bytes a token of what the layers keep for the backward pass, embeddings and last norm beside them.

        Args:
            attended: positions whose attention weights are kept; 0 where attention is fused.
            keeps: False where a layer's are computed again (gradient checkpointing), and only its input is kept.
        """
        whole = layer.bytes(attended)
        kept = self.layers * whole if keeps else self.layers * layer.residual + whole
        return kept + layer.backward + 3 * layer.residual


@dataclass(frozen=True, slots=True)
class Layer:
    """What one decoder layer keeps of a token.

    Attributes:
        residual: bytes of the hidden state between layers.
        norms: of both norms: their input in float32, the normalised state, and the inputs of the linear layers.
        attention: of queries, keys, values and the output.
        mlp: of gate, its activation, up and their product.
        weight: of one attended position's weight in all heads: the softmax in float32, and its cast.
    """

    residual: int
    norms: int
    attention: int
    mlp: int
    weight: int

    @classmethod
    def of(cls, text: Any, *, held: int, computes: int) -> "Layer":
        """From a text model's config.

        Args:
            held, computes: bytes of a number in the weights, and in the products.
        """
        heads, hidden = int(text.num_attention_heads), int(text.hidden_size)
        size = getattr(text, "head_dim", None) or hidden // heads
        queries = heads * size
        mlp = 4 * _wide(text) * computes
        if computes < held:  # autocast: norms in float32, and a cast of their output for each of q, k, v, gate and up
            norms = hidden * (2 * (4 + held) + 5 * computes)
        elif held == 4:
            norms = hidden * 2 * 3 * held
        else:
            norms = hidden * 2 * (4 + 3 * held)
        return cls(hidden * held, norms, 4 * queries * computes, mlp, heads * (4 + computes))

    @property
    def backward(self) -> int:
        """Bytes of gradients of activations while one layer's backward pass runs."""
        return self.mlp // 2 + 2 * self.residual

    def bytes(self, attended: int) -> int:
        """All of them."""
        return self.norms + self.attention + self.mlp + self.weight * attended


def _wide(text: Any) -> int:
    """Width of the MLP that a token passes: of all experts that it is sent to, in a mixture of experts."""
    experts = getattr(text, "num_experts_per_tok", None)
    one = getattr(text, "moe_intermediate_size", None) or getattr(text, "intermediate_size", None)
    shared = getattr(text, "shared_expert_intermediate_size", None) or 0
    return int((one or 4 * text.hidden_size) * (experts or 1) + shared)


def _held(job: TrainJob, shapes: Shapes, dtype: torch.dtype) -> int:
    if not isinstance(job.train.tuning, AdapterTuning):
        return shapes.parameters * dtype.itemsize
    adapters = shapes.trainable * 4
    if isinstance(job.train.tuning, QloraTuning):
        packed = shapes.linear * QLORA_BITS[job.train.tuning.double_quant] / 8
        return round(packed) + (shapes.parameters - shapes.linear) * dtype.itemsize + adapters
    return shapes.parameters * dtype.itemsize + adapters


def _logits(tokens: int, vocabulary: int, is_plain: bool) -> int:
    """Logits in float32, their log-probabilities and their gradient; on a CPU of all tokens where they fit, else of a
    tile."""
    if is_plain and tokens * vocabulary <= MOST_LOGITS:
        return 3 * 4 * tokens * vocabulary
    return 3 * 4 * min(tokens, HEAD_TOKENS) * min(vocabulary, HEAD_VOCABULARY)
