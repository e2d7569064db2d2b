"""The openai SDK's AsyncOpenAI as it comes, nothing stored."""

import asyncio

from openai import AsyncOpenAI

from benchmarks.clients.measure import Job, measured


async def ask_all(job: Job) -> int:
    """Ask all prompts; returns how many were answered."""
    waiting = iter(job.prompts)
    answered = 0
    async with AsyncOpenAI(base_url=job.url, api_key="none", max_retries=0, timeout=300) as client:

        async def work() -> None:
            nonlocal answered
            for prompt in waiting:
                reply = await client.chat.completions.create(
                    model=job.model,
                    messages=[{"role": "user", "content": prompt}],
                    max_tokens=job.max_tokens,
                    temperature=0.0,
                )
                answered += isinstance(reply.choices[0].message.content, str)

        await asyncio.gather(*(work() for _ in range(job.concurrency)))
    return answered


if __name__ == "__main__":
    the_job, counts = Job.from_arguments(), list[int]()
    with measured(counts):
        counts.append(asyncio.run(ask_all(the_job)))
