"""distilabel: a pipeline of `TextGeneration` with `OpenAILLM`, batches as large as the number in flight."""

from distilabel.models import OpenAILLM
from distilabel.pipeline import Pipeline
from distilabel.steps import LoadDataFromDicts
from distilabel.steps.tasks import TextGeneration

from benchmarks.clients.measure import Job, measured


def ask_all(job: Job) -> int:
    """Ask all prompts; returns how many were answered."""
    with Pipeline(name="bench") as pipeline:
        rows = LoadDataFromDicts(data=[{"instruction": prompt} for prompt in job.prompts], batch_size=job.concurrency)
        llm = OpenAILLM(
            model=job.model,
            base_url=job.url,
            api_key="none",
            generation_kwargs={"max_new_tokens": job.max_tokens, "temperature": 0.0},
        )
        rows >> TextGeneration(llm=llm, input_batch_size=job.concurrency)
    answers = pipeline.run(use_cache=False)["default"]["train"]["generation"]
    return sum(isinstance(answer, str) for answer in answers)


if __name__ == "__main__":
    the_job, counts = Job.from_arguments(), list[int]()
    with measured(counts):
        counts.append(ask_all(the_job))
