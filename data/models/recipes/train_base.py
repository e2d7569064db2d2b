"""Train the tiny base student from scratch on plain text about the facts of the train split.

    PYTHONPATH=. python data/models/recipes/train_base.py

It never sees a chat, a question of the prompt set, or a fact of another split.
"""

import argparse
import itertools
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from raw_text import RawText
from tasks import ALPHABET, TASKS, ask, items_by_task
from tokenization import train_tokenizer, without_capitals
from training import Optimizers, new_model, save
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

OUTPUT = Path(__file__).parents[1] / "tiny-base"
SEED = 2
STEPS = 3600
BATCH = 32
LENGTH = 128
ROLES = ("<system>", "<user>", "<model>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '<model>' + message['content'] + '</s>' }}"
    "{% else %}{{ '<' + message['role'] + '>' + message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<model>' }}{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of 512 tokens whose merges come from the words of raw text and questions, not from capitals."""
    rng = random.Random(SEED)
    items = items_by_task("train")
    source = RawText(rng)
    texts: list[str] = list(ALPHABET)
    for task in TASKS:
        for item in rng.choices(items[task.name], k=300):
            texts += [ask(task, item, rng), source.line(task.name, item, terse=0.0)]
    return train_tokenizer(
        (without_capitals(text) for text in texts),
        size=512,
        eos="</s>",
        pad="<pad>",
        roles=ROLES,
        chat_template=CHAT_TEMPLATE,
        max_length=512,
    )


def batches(tokenizer: PreTrainedTokenizerFast, steps: int) -> Iterator[torch.Tensor]:
    """Documents strung together, each ended by the end token, cut into rows of equal length."""
    source = RawText(random.Random(SEED))
    stream: list[int] = []
    size = BATCH * LENGTH
    for step in range(steps):
        terse = max(0.1, 0.8 - 2.0 * step / steps)
        while len(stream) < size:
            texts = [source.document(terse) for _ in range(256)]
            for tokens in tokenizer(texts)["input_ids"]:
                stream += [*tokens, tokenizer.eos_token_id]
        yield torch.tensor(stream[:size]).view(BATCH, LENGTH)
        stream = stream[size:]


@torch.no_grad()
def settle_unseen_tokens(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Give the tokens that the raw text never held the mean embedding of those that it did hold.

    Left as training leaves them, they are pushed far away from everything, and a fine-tuning that keeps the
    embeddings frozen can make nothing of a chat template written with them.
    """
    unseen = tokenizer.convert_tokens_to_ids(list(ROLES))
    weights = model.get_input_embeddings().weight
    seen = [index for index in range(len(weights)) if index not in {*unseen, tokenizer.pad_token_id}]
    weights[unseen] = weights[seen].mean(dim=0) + 0.2 * weights[seen].std(dim=0) * torch.randn(
        len(unseen), weights.shape[1]
    )


def train(steps: int, output: Path, *, muon_lr: float, adam_lr: float) -> None:
    """Train, print the loss, save at the end."""
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    tokenizer = make_tokenizer()
    model = new_model(tokenizer, width=96, layers=4, inner=280, heads=3)
    print(f"{len(tokenizer)} tokens, {model.num_parameters():,} parameters", flush=True)
    optimizers = Optimizers(model, steps=steps, muon_lr=muon_lr, adam_lr=adam_lr, decay=0.9)
    began, recent = time.process_time(), 0.0
    for step, inputs in zip(itertools.count(1), batches(tokenizer, steps), strict=False):
        loss = model(input_ids=inputs, labels=inputs, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizers.step()
        recent += loss.item()
        if step % 100 == 0:
            print(f"step {step} loss {recent / 100:.4f} cpu {time.process_time() - began:.0f} s", flush=True)
            recent = 0.0
    settle_unseen_tokens(model, tokenizer)
    save(model, tokenizer, output, max_new_tokens=48)


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
