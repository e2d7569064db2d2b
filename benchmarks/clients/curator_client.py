"""bespokelabs-curator, backend `openai`, its cache in an empty folder.

litellm's own copy of the encoding counts tokens, since the hub of the encodings may not be reachable.
"""

import os
import tempfile
from pathlib import Path

import litellm

TIKTOKEN = Path(litellm.__file__).parent / "litellm_core_utils" / "tokenizers"
os.environ["TIKTOKEN_CACHE_DIR"] = str(TIKTOKEN)

from bespokelabs import curator  # noqa: E402 (it reads the variable when it is imported)

from benchmarks.clients.measure import Job, measured  # noqa: E402


def ask_all(job: Job, folder: str) -> int:
    """Ask all prompts; returns how many were answered."""
    llm = curator.LLM(
        model_name=job.model,
        backend="openai",
        generation_params={"max_tokens": job.max_tokens, "temperature": 0.0},
        backend_params={
            "base_url": job.url,
            "max_requests_per_minute": 10_000_000,
            "max_tokens_per_minute": 10_000_000_000,
            "max_concurrent_requests": job.concurrency,
            "invalid_finish_reasons": ["content_filter"],
        },
    )
    return len(llm(job.prompts, working_dir=folder).dataset)


if __name__ == "__main__":
    the_job, counts = Job.from_arguments(), list[int]()
    with tempfile.TemporaryDirectory() as temporary, measured(counts):
        counts.append(ask_all(the_job, temporary))
