"""Write the quickstart prompt set: questions with their answers, every split in one file.

    PYTHONPATH=. python data/models/recipes/make_prompts.py

The pipeline assigns the splits itself, by hashing `group_id`; here they only decide how many prompts of each are made.
"""

import json
import random
from pathlib import Path

from tasks import TASKS, Item, Task, ask, items_by_task

from pipeline.text.split import Split

OUTPUT = Path(__file__).parents[3] / "prompts" / "quickstart.jsonl"
SEED = 1
PER_TASK: dict[Split, int] = {"train": 1000, "validation": 50, "test": 115}


def normalised(prompt: str) -> str:
    """The form in which two prompts count as the same."""
    return " ".join(prompt.casefold().split())


def questions(task: Task, items: list[Item], count: int, rng: random.Random, seen: set[str]) -> list[tuple[str, Item]]:
    """Draw `count` different questions, going round the items so that each is asked about equally often."""
    order = rng.sample(items, len(items))
    drawn: list[tuple[str, Item]] = []
    turn = 0
    while len(drawn) < count:
        item = order[turn % len(order)]
        turn += 1
        prompt = ask(task, item, rng)
        if normalised(prompt) not in seen:
            seen.add(normalised(prompt))
            drawn.append((prompt, item))
    return drawn


def render() -> str:
    """The whole file as text: the same on every machine."""
    seen: set[str] = set()
    drawn: list[tuple[str, str, Item]] = []
    for split, count in PER_TASK.items():
        by_task = items_by_task(split)
        for task in TASKS:
            rng = random.Random(f"{SEED}/{split}/{task.name}")
            drawn += [
                (task.name, prompt, item) for prompt, item in questions(task, by_task[task.name], count, rng, seen)
            ]
    random.Random(SEED).shuffle(drawn)
    numbers = {task.name: 0 for task in TASKS}
    lines: list[str] = []
    for name, prompt, item in drawn:
        numbers[name] += 1
        row = {
            "id": f"{name}-{numbers[name]:05}",
            "task": name,
            "prompt": prompt,
            "answer": item.answer,
            "group_id": item.group_id,
        }
        lines.append(json.dumps(row))
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the file."""
    OUTPUT.parent.mkdir(exist_ok=True)
    OUTPUT.write_text(render(), encoding="ascii", newline="\n")


if __name__ == "__main__":
    main()
