"""Measure a model on the quickstart prompts: share of answers equal to the reference, by task.

PYTHONPATH=. python data/models/recipes/accuracy.py data/models/tiny-teacher --split validation
"""

import argparse
import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import torch
from make_prompts import OUTPUT as PROMPTS
from tasks import TEST_SHARE, VALIDATION_SHARE
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from pipeline.text.split import Split, split_of

BATCH = 128
LONGEST_ANSWER = 40


@dataclass
class Score:
    """Counts of right answers under three readings of "right"."""

    asked: int = 0
    strict: int = 0
    first_line: int = 0
    contains: int = 0
    by_task: dict[str, list[int]] = field(default_factory=lambda: defaultdict(lambda: [0, 0]))

    def add(self, task: str, output: str, answer: str) -> None:
        """Count one answer: equal to the reference, its first line equal, or the reference somewhere within."""
        self.asked += 1
        right = output.strip() == answer
        self.strict += right
        self.first_line += output.strip().split("\n")[0].strip() == answer
        self.contains += answer in output
        self.by_task[task][0] += right
        self.by_task[task][1] += 1

    def lines(self) -> list[str]:
        """The score in words, one line for the whole and one for each task."""
        total = (
            f"strict {self.strict / self.asked:.4f}  first line {self.first_line / self.asked:.4f}  "
            f"contains {self.contains / self.asked:.4f}  ({self.asked} prompts)"
        )
        return [total, *(f"  {name:<13}{right / count:.3f}" for name, (right, count) in sorted(self.by_task.items()))]


def read_prompts(split: Split) -> list[dict[str, str]]:
    """The prompts of one split."""
    rows = [json.loads(line) for line in PROMPTS.read_text(encoding="ascii").splitlines()]
    return [r for r in rows if split_of(r["group_id"], validation=VALIDATION_SHARE, test=TEST_SHARE) == split]


@torch.inference_mode()
def measure(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, str]], *, examples: str = ""
) -> Score:
    """Answer the prompts greedily through the chat template, or after `examples` as plain text when given."""
    model.eval()
    tokenizer.padding_side = "left"
    score = Score()
    rows = sorted(rows, key=lambda row: len(row["prompt"]))
    for start in range(0, len(rows), BATCH):
        part = rows[start : start + BATCH]
        if examples:
            texts = [f"{examples}{row['prompt']}\n" for row in part]
        else:
            chats = [[{"role": "user", "content": row["prompt"]}] for row in part]
            texts = [str(tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True)) for c in chats]
        batch = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
        output = model.generate(**batch, do_sample=False, max_new_tokens=LONGEST_ANSWER)
        answers = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        for row, answer in zip(part, answers, strict=True):
            score.add(row["task"], answer, row["answer"])
    return score


def main() -> None:
    """Measure the model of the command line and print its score."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--split", choices=("train", "validation", "test"), default="validation")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--shots", type=int, default=0, help="solved train prompts before each question, no template")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    shots = read_prompts("train")[: args.shots]
    examples = "".join(f"{row['prompt']}\n{row['answer']}\n\n" for row in shots)
    print("\n".join(measure(model, tokenizer, read_prompts(args.split), examples=examples).lines()))


if __name__ == "__main__":
    main()
