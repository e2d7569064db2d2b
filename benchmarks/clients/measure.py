"""What every client prints: seconds, CPU seconds and memory of its own process, without imports."""

import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

PROMPT_WORDS = " ".join(["question"] * 30)


@dataclass(frozen=True, slots=True)
class Job:
    """What to ask.

    Attributes:
        url: base URL up to and including `/v1`.
        model: the model's name there.
        count: number of requests.
        concurrency: most of them in flight.
        max_tokens: cap of each answer.
    """

    url: str
    model: str
    count: int
    concurrency: int
    max_tokens: int

    @classmethod
    def from_arguments(cls) -> "Job":
        """`URL MODEL COUNT CONCURRENCY MAX_TOKENS`, as every client takes them."""
        url, model, count, concurrency, max_tokens = sys.argv[1:6]
        return cls(url, model, int(count), int(concurrency), int(max_tokens))

    @property
    def prompts(self) -> list[str]:
        """Different prompts of about 40 tokens."""
        return [f"Number {index}: {PROMPT_WORDS}?" for index in range(self.count)]

    def body(self, prompt: str) -> dict[str, object]:
        """The JSON of a chat completion that asks one prompt."""
        message = {"role": "user", "content": prompt}
        return {"model": self.model, "messages": [message], "max_tokens": self.max_tokens, "temperature": 0.0}


@contextmanager
def measured(answered: list[int]) -> Iterator[None]:
    """Print one JSON line about the block: wall and CPU seconds (children that ended included), peak RSS in MB.

    Args:
        answered: the block appends how many answers it got.
    """
    began, cpu = time.perf_counter(), _cpu_s()
    yield
    wall, used = time.perf_counter() - began, _cpu_s() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    line = {"answered": sum(answered), "wall_s": wall, "cpu_s": used, "peak_mb": peak, "pid": os.getpid()}
    print(json.dumps(line), flush=True)


def _cpu_s() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
