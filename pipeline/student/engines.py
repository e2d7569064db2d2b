"""In-process engines that answer questions greedily: transformers and vLLM, on the same token ids, read back alike."""

import gc
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Protocol

import torch

from pipeline.core.errors import UsageError, boundary
from pipeline.student.jobs import Answer, AnswerJob, Question
from pipeline.student.tokenise import encode_texts, load_tokenizer, render, stop_ids

GPU_SHARE: Final = 0.9
"""Share of a GPU's memory that vLLM's engines take together."""


class Engine(Protocol):
    """A loaded model."""

    def generate(self, prompts: Sequence[Sequence[int]], caps: Sequence[int]) -> list[list[int]]:
        """Continue each prompt greedily up to a stop token (included) or its cap; in the order of the prompts."""

    def close(self) -> None:
        """Let the model go."""


@dataclass(frozen=True, slots=True)
class Examinee:
    """A model that answers: its tokenizer, its engine, and what bounds an answer.

    Attributes:
        stops: ids of the tokens that end an answer.
        room: most tokens of prompt and answer together, or None.
    """

    tokenizer: Any
    engine: Engine
    stops: tuple[int, ...]
    max_tokens: int
    room: int | None

    def answer(self, questions: Sequence[Question]) -> list[Answer]:
        """Answer each question; one whose prompt leaves no room gets an empty answer."""
        prompts = self._prompts(questions)
        caps = [self._cap(len(ids)) for ids in prompts]
        fits = [at for at, cap in enumerate(caps) if cap > 0]
        answers = [Answer("", 0, "prompt_too_long")] * len(prompts)
        outputs = self.engine.generate([prompts[at] for at in fits], [caps[at] for at in fits])
        for at, ids in zip(fits, outputs, strict=True):
            text = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            stopped = len(ids) > 0 and ids[-1] in self.stops
            answers[at] = Answer(text, len(ids), "stop" if stopped else "length")
        return answers

    def _cap(self, prompt_tokens: int) -> int:
        return self.max_tokens if self.room is None else min(self.max_tokens, self.room - prompt_tokens)

    def _prompts(self, questions: Sequence[Question]) -> list[list[int]]:
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


def load_examinee(job: AnswerJob, model: str, revision: str | None, *, resident: int) -> Examinee:
    """Load a model with its engine.

    Args:
        resident: models that are loaded at the same time; they share a GPU's memory.

    Raises:
        UsageError: the model cannot be loaded.
    """
    from transformers import AutoConfig

    tokenizer = load_tokenizer(model, revision)
    stops = stop_ids(model, revision, tokenizer)
    room = getattr(AutoConfig.from_pretrained(model, revision=revision), "max_position_embeddings", None)
    todo = "give a model that the engine loads, or the other evaluate.engine"
    with boundary(UsageError, f"{job.engine} cannot load the model", where=model, todo=todo):
        if job.engine == "vllm":
            engine: Engine = VllmEngine(job, model, revision, stops, room, resident)
        else:
            engine = TransformersEngine(job, model, revision, stops, tokenizer)
    return Examinee(tokenizer, engine, stops, job.max_tokens, room)


class TransformersEngine:
    """`generate` over batches of prompts of similar length, padded on the left."""

    def __init__(
        self, job: AnswerJob, model: str, revision: str | None, stops: tuple[int, ...], tokenizer: Any
    ) -> None:
        from transformers import AutoModelForCausalLM, GenerationConfig

        self._device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        dtype = getattr(torch, job.precision)
        self._model = (
            AutoModelForCausalLM.from_pretrained(model, revision=revision, dtype=dtype).to(self._device).eval()
        )
        self._pad = stops[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self._stops = stops
        self._batch_size = job.batch_size
        # The model's own generation config would fill in what ours leaves open (a repetition penalty, say).
        self._model.generation_config = GenerationConfig(
            do_sample=False,
            num_beams=1,
            eos_token_id=list(stops),
            pad_token_id=self._pad,
            use_cache=True,
        )

    def generate(self, prompts: Sequence[Sequence[int]], caps: Sequence[int]) -> list[list[int]]:
        """See `Engine`. A batch has one cap, the lowest of its prompts'."""
        order = sorted(range(len(prompts)), key=lambda at: len(prompts[at]))
        outputs: list[list[int]] = [[] for _ in prompts]
        for start in range(0, len(order), self._batch_size):
            ats = order[start : start + self._batch_size]
            batch = self._batch([prompts[at] for at in ats], min(caps[at] for at in ats))
            for at, ids in zip(ats, batch, strict=True):
                outputs[at] = ids
        return outputs

    def _batch(self, prompts: list[Sequence[int]], cap: int) -> list[list[int]]:
        width = max(len(ids) for ids in prompts)
        padded = [[self._pad] * (width - len(ids)) + list(ids) for ids in prompts]
        mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
        with torch.inference_mode():
            output = self._model.generate(
                input_ids=torch.tensor(padded, device=self._device),
                attention_mask=torch.tensor(mask, device=self._device),
                max_new_tokens=cap,
            )
        return [self._until_stop(row) for row in output[:, width:].tolist()]

    def _until_stop(self, ids: list[int]) -> list[int]:
        """Without the padding behind the first stop token."""
        end = next((at + 1 for at, token in enumerate(ids) if token in self._stops), len(ids))
        return ids[:end]

    def close(self) -> None:
        """See `Engine`."""
        del self._model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class VllmEngine:
    """vLLM's engine in this process. `close` does not free all it holds: use one process a model."""

    def __init__(
        self,
        job: AnswerJob,
        model: str,
        revision: str | None,
        stops: tuple[int, ...],
        room: int | None,
        resident: int,
    ) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        is_cpu = not torch.accelerator.is_available()
        if is_cpu:
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
            # Threads are OpenMP's, as for the other engine; vLLM's own choice binds them to cores others may hold.
            os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        from vllm import LLM, SamplingParams

        memory = {} if is_cpu else {"gpu_memory_utilization": GPU_SHARE / resident}
        self._llm = LLM(
            model=model,
            revision=revision,
            dtype=job.precision,
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
