"""Plain aiohttp on asyncio's own loop, nothing stored: the least that a Python client costs."""

import asyncio

import aiohttp

from benchmarks.clients.measure import Job, measured


async def ask_all(job: Job) -> int:
    """Ask all prompts; returns how many were answered."""
    waiting = iter(job.prompts)
    answered = 0
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:

        async def work() -> None:
            nonlocal answered
            for prompt in waiting:
                async with session.post(f"{job.url}/chat/completions", json=job.body(prompt)) as response:
                    reply = await response.json()
                answered += isinstance(reply["choices"][0]["message"]["content"], str)

        await asyncio.gather(*(work() for _ in range(job.concurrency)))
    return answered


if __name__ == "__main__":
    the_job, counts = Job.from_arguments(), list[int]()
    with measured(counts):
        counts.append(asyncio.run(ask_all(the_job)))
