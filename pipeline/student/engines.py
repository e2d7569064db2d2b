"""In-process engines that answer questions greedily: transformers and vLLM, on the same token ids, read back alike."""

import gc
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, Final, Protocol

import torch

from pipeline.core.errors import UsageError, boundary
from pipeline.student.jobs import Answer, AnswerJob, Exam, Question
from pipeline.student.loading import loading, require_safetensors
from pipeline.student.tokenise import encode_texts, load_tokenizer, most_positions, render, stop_ids

GPU_SHARE: Final = 0.9
"""Share of a GPU's memory that vLLM's engines take together."""
ROOM_TO_WORK: Final = 8 * 2**30
"""Bytes that an engine needs beside its weights, when several share a GPU."""


class Engine(Protocol):
    """A loaded model."""

    def generate(self, prompts: Sequence[Sequence[int]], caps: Sequence[int]) -> list[list[int]]:
        """Continue each prompt greedily up to a stop token (included) or its cap; in the order of the prompts."""

    def close(self) -> None:
        """Let the model go."""


@dataclass(frozen=True, slots=True)
class Prompter:
    """Turns questions into the ids that a model is given.

    Attributes:
        stops: ids of the tokens that end an answer.
        limit: most tokens of prompt and answer together that the model takes, or None.
    """

    tokenizer: Any
    stops: tuple[int, ...]
    limit: int | None

    @classmethod
    def of(cls, exam: Exam) -> "Prompter":
        """Load a model's tokenizer and limits.

        Raises:
            UsageError: they cannot be loaded.
        """
        tokenizer = load_tokenizer(exam.model, exam.revision)
        limits = (most_positions(exam.model, exam.revision), exam.max_model_len)
        limit = min((one for one in limits if one is not None), default=None)
        return cls(tokenizer, stop_ids(exam.model, exam.revision, tokenizer), limit)

    def prompts(self, questions: Sequence[Question]) -> list[list[int]]:
        """Ids of each prompt: conversations through the chat template, raw text with the tokens the model expects."""
        prompts: list[list[int]] = [[] for _ in questions]
        for is_raw in (False, True):
            ats = [at for at, question in enumerate(questions) if (question.messages is None) == is_raw]
            texts = [self._text(questions[at]) for at in ats]
            for at, ids in zip(ats, encode_texts(self.tokenizer, texts, add_special_tokens=is_raw), strict=True):
                prompts[at] = ids
        return prompts

    def _text(self, question: Question) -> str:
        if question.messages is None:
            return question.text or ""
        return render(self.tokenizer, question.messages, add_generation_prompt=True)

    def cap(self, prompt_tokens: int, max_tokens: int) -> int:
        """Most tokens of an answer; 0 or less where the prompt leaves no room."""
        return max_tokens if self.limit is None else min(max_tokens, self.limit - prompt_tokens)

    def room(self, questions: Sequence[Question], max_tokens: int) -> int:
        """Tokens of the longest prompt with its answer: what an engine has to reserve, often far below the limit."""
        longest = max((len(ids) for ids in self.prompts(questions)), default=1)
        return longest + max(1, self.cap(longest, max_tokens))


@dataclass(frozen=True, slots=True)
class Examinee:
    """A model that answers."""

    prompter: Prompter
    engine: Engine
    max_tokens: int

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """Answer each question; one whose prompt leaves no room gets an empty answer."""
        prompts = self.prompter.prompts(questions)
        caps = [self.prompter.cap(len(ids), self.max_tokens) for ids in prompts]
        fits = [at for at, cap in enumerate(caps) if cap > 0]
        answers = [Answer("", 0, "prompt_too_long")] * len(prompts)
        outputs = self.engine.generate([prompts[at] for at in fits], [caps[at] for at in fits])
        for at, ids in zip(fits, outputs, strict=True):
            text = self.prompter.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            stopped = len(ids) > 0 and ids[-1] in self.prompter.stops
            answers[at] = Answer(text, len(ids), "stop" if stopped else "length")
        return answers


def load_examinee(job: AnswerJob, exam: Exam, *, gpu_share: float) -> Examinee:
    """Load a model with its engine, for the questions of the exam.

    Args:
        gpu_share: share of a GPU's memory that vLLM may take.

    Raises:
        UsageError: the model cannot be loaded.
    """
    prompter = Prompter.of(exam)
    todo = "give a model that the engine loads, or the other evaluate.engine"
    with boundary(UsageError, f"{job.engine} cannot load the model", where=exam.model, todo=todo):
        if job.engine == "vllm":
            questions = [question for asked in exam.questions.values() for question in asked]
            room = prompter.room(questions, job.max_tokens)
            if prompter.limit is not None:
                room = min(room, prompter.limit)
            engine: Engine = VllmEngine(job, exam, prompter.stops, room, gpu_share)
        else:
            engine = TransformersEngine(job, exam, prompter)
    return Examinee(prompter, engine, job.max_tokens)


def gpu_need(size: int | None, gpus: int = 1) -> int:
    """Bytes that a model needs on each of the GPUs that share it: its part of the weights, and room to work.

    Args:
        size: bytes of the loaded weights; None where they are not known, which counts as nothing.
    """
    return ROOM_TO_WORK + (size or 0) // gpus


def gpu_shares(needs: Mapping[str, int]) -> dict[str, float]:
    """How models that are loaded at once divide a GPU's memory: by what each needs of it."""
    return {name: GPU_SHARE * need / sum(needs.values()) for name, need in needs.items()}


def fit_together(needs: Mapping[str, int], memory: int | None) -> bool:
    """Whether models can be loaded at once on a GPU of `memory` bytes; None is no GPU, where nothing is divided."""
    return len(needs) <= 1 or memory is None or sum(needs.values()) <= GPU_SHARE * memory


def gpu_memory() -> int | None:
    """Bytes of the first GPU's memory; None where there is none that CUDA or ROCm knows."""
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def batches(prompts: Sequence[Sequence[int]], caps: Sequence[int], size: int) -> list[list[int]]:
    """Places of the prompts of each batch: of equal cap and similar length.

    `generate` has one cap a batch. Were it the lowest, a prompt near the model's limit would cut its neighbours'
    answers; were it the highest, such a prompt would be continued past the model's last position.
    """
    order = sorted(range(len(prompts)), key=lambda at: (-caps[at], len(prompts[at])))
    same = [list(ats) for _, ats in groupby(order, key=lambda at: caps[at])]
    return [ats[start : start + size] for ats in same for start in range(0, len(ats), size)]


class TransformersEngine:
    """`generate` over batches of prompts of similar length, padded on the left."""

    def __init__(self, job: AnswerJob, exam: Exam, prompter: Prompter) -> None:
        from transformers import AutoModelForCausalLM

        self._device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        dtype = getattr(torch, job.precision)
        todo = "give a model folder (or hub id and revision) that transformers loads as a causal language model"
        require_safetensors(exam.model)
        with loading("the model cannot be loaded", model=exam.model, todo=todo):
            loaded = AutoModelForCausalLM.from_pretrained(
                exam.model, revision=exam.revision, dtype=dtype, trust_remote_code=False, use_safetensors=True
            )
        self._model = loaded.to(self._device).eval()
        pad = prompter.tokenizer.pad_token_id
        self._stops = prompter.stops
        self._pad = self._stops[0] if pad is None else pad
        self._batch_size = job.batch_size
        # The model's own generation config would fill in what ours leaves open (a repetition penalty, say).
        self._model.generation_config = greedy(self._stops, self._pad)

    def generate(self, prompts: Sequence[Sequence[int]], caps: Sequence[int]) -> list[list[int]]:
        """See `Engine`."""
        outputs: list[list[int]] = [[] for _ in prompts]
        for ats in batches(prompts, caps, self._batch_size):
            batch = self._batch([prompts[at] for at in ats], caps[ats[0]])
            for at, ids in zip(ats, batch, strict=True):
                outputs[at] = ids
        return outputs

    def _batch(self, prompts: list[Sequence[int]], cap: int) -> list[list[int]]:
        with torch.inference_mode():
            return continue_batch(self._model, prompts, cap, self._stops, self._pad)

    def close(self) -> None:
        """See `Engine`."""
        del self._model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def greedy(stops: Sequence[int], pad: int) -> Any:
    """A generation config that says everything that may decide an answer, but its length."""
    from transformers import GenerationConfig

    return GenerationConfig(do_sample=False, num_beams=1, eos_token_id=list(stops), pad_token_id=pad, use_cache=True)


def continue_batch(
    model: Any, prompts: Sequence[Sequence[int]], cap: int, stops: Sequence[int], pad: int
) -> list[list[int]]:
    """Continue prompts as the model's generation config says, padded on the left, up to a stop token (included)."""
    width = max(len(ids) for ids in prompts)
    padded = [[pad] * (width - len(ids)) + list(ids) for ids in prompts]
    mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
    output = model.generate(
        input_ids=torch.tensor(padded, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        max_new_tokens=cap,
    )
    rows: list[list[int]] = output[:, width:].tolist()
    return [_until_stop(row, stops) for row in rows]


def _until_stop(ids: list[int], stops: Sequence[int]) -> list[int]:
    """Without the padding behind the first stop token."""
    end = next((at + 1 for at, token in enumerate(ids) if token in stops), len(ids))
    return ids[:end]


class VllmEngine:
    """vLLM's engine in this process. `close` does not free all it holds: use one process a model."""

    def __init__(self, job: AnswerJob, exam: Exam, stops: tuple[int, ...], room: int, gpu_share: float) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        is_cpu = not torch.accelerator.is_available()
        if is_cpu:
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
            # Threads are OpenMP's, as for the other engine; vLLM's own choice binds them to cores others may hold.
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        from vllm import LLM, SamplingParams

        memory = {} if is_cpu else {"gpu_memory_utilization": gpu_share}
        self._llm = LLM(
            model=exam.model,
            revision=exam.revision,
            tensor_parallel_size=exam.tensor_parallel_size,
            dtype=job.precision,
            quantization=exam.quantization,
            max_model_len=room,
            max_num_seqs=job.batch_size,
            enforce_eager=is_cpu,
            enable_prefix_caching=False,  # a second pass over equal prompts must be as much work as the first
            generation_config="vllm",  # not the model's: its sampling parameters are not ours
            seed=0,
            **memory,
        )
        self._greedy = partial(SamplingParams, temperature=0.0, stop_token_ids=list(stops), detokenize=False)

    def generate(self, prompts: Sequence[Sequence[int]], caps: Sequence[int]) -> list[list[int]]:
        """See `Engine`."""
        if not prompts:
            return []
        asked = [{"prompt_token_ids": list(ids)} for ids in prompts]
        outputs = self._llm.generate(asked, [self._greedy(max_tokens=cap) for cap in caps], use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def close(self) -> None:
        """See `Engine`."""
        del self._llm
        gc.collect()
