"""Plain httpx, nothing stored."""

import asyncio

import httpx

from benchmarks.clients.measure import Job, measured


async def ask_all(job: Job) -> int:
    """Ask all prompts; returns how many were answered."""
    waiting = iter(job.prompts)
    answered = 0
    limits = httpx.Limits(max_connections=job.concurrency, max_keepalive_connections=job.concurrency)
    async with httpx.AsyncClient(limits=limits, timeout=300) as client:

        async def work() -> None:
            nonlocal answered
            for prompt in waiting:
                response = await client.post(f"{job.url}/chat/completions", json=job.body(prompt))
                answered += isinstance(response.json()["choices"][0]["message"]["content"], str)

        await asyncio.gather(*(work() for _ in range(job.concurrency)))
    return answered


if __name__ == "__main__":
    the_job, counts = Job.from_arguments(), list[int]()
    with measured(counts):
        counts.append(asyncio.run(ask_all(the_job)))
