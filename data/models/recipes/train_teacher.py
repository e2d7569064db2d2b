"""Train the tiny teacher from scratch on the facts of the train split.

    PYTHONPATH=. python data/models/recipes/train_teacher.py

About half an hour on one thread. Every question is drawn anew, so the teacher sees far more wordings than the prompt
set holds, but only facts of the train split.
"""

import argparse
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from accuracy import measure, read_prompts
from tasks import ALPHABET, TASKS, ask, items_by_task
from tokenization import train_tokenizer, without_capitals
from training import Optimizers, new_model, pad_batch, save
from transformers import PreTrainedTokenizerFast

OUTPUT = Path(__file__).parents[1] / "tiny-teacher"
SEED = 1
STEPS = 1400
BATCH = 128
POOL = 32  # batches drawn together and cut by length, so that little is spent on filling
EVALUATE_EVERY = 200
# Tasks that need more practice than the others, found on the validation split.
WEIGHTS = {"add": 2.0, "subtract": 2.0, "sort": 2.0, "reverse": 1.5, "halve": 1.5, "double": 1.5, "from_roman": 1.5}
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose merges come from the words of questions and answers on the train split.

    Strings of capitals (made-up words and Roman numerals) are left out: merges would hide their letters.
    """
    rng = random.Random(SEED)
    items = items_by_task("train")
    texts: list[str] = list(ALPHABET)
    for task in TASKS:
        for item in rng.choices(items[task.name], k=500):
            texts += [ask(task, item, rng), item.answer]
    return train_tokenizer(
        (without_capitals(text) for text in texts),
        size=1024,
        eos="<|end|>",
        pad="<|pad|>",
        roles=("<|system|>", "<|user|>", "<|assistant|>"),
        chat_template=CHAT_TEMPLATE,
        max_length=512,
    )


def batches(tokenizer: PreTrainedTokenizerFast) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless batches of questions with answers; only the answer and the end token carry a label."""
    rng = random.Random(SEED)
    items = items_by_task("train")
    weights = [WEIGHTS.get(task.name, 1.0) for task in TASKS]
    while True:
        pairs = []
        for task in rng.choices(TASKS, weights=weights, k=BATCH * POOL):
            item = rng.choice(items[task.name])
            pairs.append((f"<|user|>{ask(task, item, rng)}<|assistant|>", f"{item.answer}<|end|>"))
        starts = tokenizer([question for question, _ in pairs])["input_ids"]
        ends = tokenizer([answer for _, answer in pairs])["input_ids"]
        rows = [(start + end, len(start)) for start, end in zip(starts, ends, strict=True)]
        rows.sort(key=lambda row: len(row[0]))
        cuts = list(range(0, len(rows), BATCH))
        rng.shuffle(cuts)
        for cut in cuts:
            yield pad_batch(rows[cut : cut + BATCH], tokenizer.pad_token_id)


def train(steps: int, output: Path, *, muon_lr: float, adam_lr: float) -> None:
    """Train, print the progress on the validation split, save whenever it is measured."""
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    tokenizer = make_tokenizer()
    model = new_model(tokenizer, width=256, layers=5, inner=624, heads=4)
    print(f"{len(tokenizer)} tokens, {model.num_parameters():,} parameters", flush=True)
    optimizers = Optimizers(model, steps=steps, muon_lr=muon_lr, adam_lr=adam_lr, decay=0.9)
    validation = read_prompts("validation")
    began, recent = time.process_time(), 0.0
    for step, (inputs, labels) in zip(range(1, steps + 1), batches(tokenizer), strict=False):
        model.train()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=inputs, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizers.step()
        recent += loss.item()
        if step % 20 == 0:
            print(f"step {step} loss {recent / 20:.4f} cpu {time.process_time() - began:.0f} s", flush=True)
            recent = 0.0
        if step % EVALUATE_EVERY == 0 or step == steps:
            save(model, tokenizer, output, max_new_tokens=48)
            print("\n".join(measure(model, tokenizer, validation).lines()), flush=True)


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--muon-lr", type=float, default=0.008)
    parser.add_argument("--adam-lr", type=float, default=3e-3)
    args = parser.parse_args()
    train(args.steps, args.output, muon_lr=args.muon_lr, adam_lr=args.adam_lr)


if __name__ == "__main__":
    main()
