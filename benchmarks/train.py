"""Real tokens per CPU-second of fine-tuning: TRL's `SFTTrainer` as its docs use it, TRL tuned, and this pipeline.

`python -m benchmarks.train` makes rows of varied length with one seed, trains two models on them in four ways, each run
in a process of its own with one thread, the ways taking turns, and prints and writes medians and all runs to
benchmarks/results/train.json and .md. Only the steps are timed: not loading, tokenisation or saving. A token counts if
it is a row's, not padding. First it trains one step on the same 32 rows in each way and refuses to go on if the losses
differ by more than 1e-5. It exits 1 where a target is missed: twice the first way, 1.15 times the second.
"""

import argparse
import json
import math
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any, Final

import numpy as np

ROOT: Final = Path(__file__).resolve().parents[1]
RESULTS: Final = ROOT / "benchmarks" / "results"
MODELS: Final = {"0.5M": ("tiny-base", 1280), "4M": ("tiny-teacher", 384)}
"""Folder in data/models, and rows; the second one's weights are drawn anew, since only its size matters."""
WAYS: Final = {
    "trl": "TRL as its docs use it",
    "trl-float32": "the same in float32",
    "trl-tuned": "TRL tuned: grouped by length, float32, no checkpointing",
    "ours": "this pipeline, grouped by length (its default)",
    "ours-packed": "this pipeline, packed, random order",
}
BATCH: Final = 32
MAX_TOKENS: Final = 256
TARGETS: Final = {"trl": 2.0, "trl-tuned": 1.15}
WORDS: Final = """
the of and to in is that it was for on are with as his they be at one have this from or had by hot but some what there
we can out other were all your when up use word how said an each she which do their time if will way about many then
them would write like so these her long make thing see him two has look more day could go come did my sound no most
number who over know water than call first people may down side been now find any new work part
"""


@dataclass(frozen=True, slots=True)
class Run:
    """One training.

    Attributes:
        tokens: of the rows that were trained.
        cpu_s: user and system seconds of the process over all steps.
        first_loss: of the first step.
        peak_mb: largest resident set of the process until the last step's end.
    """

    tokens: int
    cpu_s: float
    first_loss: float
    peak_mb: float

    @property
    def tokens_per_s(self) -> float:
        """Real tokens per CPU-second."""
        return self.tokens / self.cpu_s


# -------------------------------------------------------------------------------------------------- rows and models


def make_rows(folder: Path, count: int) -> None:
    """Questions and answers whose lengths are spread as in instruction data (log-normal), drawn with one seed."""
    random = np.random.default_rng(11)

    def text(median: float, spread: float) -> str:
        words = int(np.clip(random.lognormal(math.log(median), spread), 2, 90))
        return " ".join(random.choice(WORDS.split(), words))

    tokenizer = _tokenizer(folder / "model")
    rows: list[dict[str, str]] = []
    while len(rows) < count:
        row = {"prompt": text(12, 0.5), "completion": text(18, 0.9)}
        if len(tokenizer(row["prompt"] + row["completion"])["input_ids"]) < MAX_TOKENS - 16:
            rows.append(row)
    (folder / "rows.json").write_text(json.dumps(rows), "utf-8")


def make_model(folder: Path, source: str) -> None:
    """A copy of a model of this repository; the larger one with random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shutil.copytree(ROOT / "data" / "models" / source, folder)
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder)
    if source == "tiny-teacher":
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


# ------------------------------------------------------------------------------------------------------------ ways


def train_with_trl(way: str, folder: Path, scratch: Path, count: int) -> Run:
    """TRL's trainer on prompt-completion rows, with its defaults but for what `way` changes."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    tuned = {"bf16": False, "gradient_checkpointing": False, "train_sampling_strategy": "group_by_length"}
    changes: dict[str, Any] = {"trl": {}, "trl-float32": {"bf16": False}, "trl-tuned": tuned}[way]
    args = SFTConfig(
        output_dir=str(scratch),
        per_device_train_batch_size=BATCH,
        num_train_epochs=1,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_first_step=True,
        **changes,
    )
    rows = json.loads((folder / "rows.json").read_text("utf-8"))[:count]
    roles = (("prompt", "user"), ("completion", "assistant"))
    data = Dataset.from_list([{side: [{"role": role, "content": row[side]}] for side, role in roles} for row in rows])
    clock = {"begin": 0.0, "end": 0.0}

    class Clock(TrainerCallback):
        """Reads the clock around the steps."""

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock["begin"] = time.process_time()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock["end"] = time.process_time()

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype="float32")
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=data,
        processing_class=_tokenizer(folder / "model"),
        callbacks=[Clock()],
    )
    tokens = sum(len(row["input_ids"]) for row in trainer.train_dataset)
    trainer.train()
    return Run(tokens, clock["end"] - clock["begin"], trainer.state.log_history[0]["loss"], _peak_mb())


def train_here(way: str, folder: Path, scratch: Path, count: int) -> Run:
    """This pipeline's training step, from the rows of a data set on."""
    from pipeline.core.config_train import StudentModel, TrainConfig
    from pipeline.core.record import Message
    from pipeline.student.jobs import TrainJob
    from pipeline.student.worker import run_job
    from tests.training_rows import sum_row, write_dataset

    pairs = json.loads((folder / "rows.json").read_text("utf-8"))[:count]
    rows = [
        sum_row(
            number,
            prompt=(Message("user", pair["prompt"]),),
            completion=(Message("assistant", pair["completion"]),),
        )
        for number, pair in enumerate(pairs)
    ]
    packed = way == "ours-packed"
    config = {
        "max_length": 512,
        "batch_size": BATCH,
        "micro_batch_size": BATCH,
        "precision": "float32",
        "packing": packed,
        "group_by_length": not packed,
        "log_steps": 10,
        "checkpoint": {"minutes": None},
        "evaluation": {"rows": 0},
        "threads": 1,
    }
    for name in ("out", "work"):
        (scratch / name).mkdir()
    job = TrainJob(
        train=TrainConfig.model_validate(config),
        student=StudentModel(model=str(folder / "model")),
        data=write_dataset(scratch / "dataset", rows) / "data",
        out=scratch / "out",
        workdir=scratch / "work",
        world_size=1,
        launch="benchmark",
    )
    marks: dict[str, float] = {}

    def report(said: dict[str, Any]) -> None:
        if "started" in said:
            marks["begin"] = time.process_time()
        elif "step" in said:
            marks["end"], marks["peak"] = time.process_time(), _peak_mb()

    done = run_job(job, report)
    losses = json.loads((job.out / "loss.json").read_text("utf-8"))
    return Run(done["metrics"]["tokens_seen"], marks["end"] - marks["begin"], losses[0]["loss"], marks["peak"])


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run_here(way: str, folder: Path, count: int) -> None:
    """In a process of its own: train in one way, print the figures."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        train = train_with_trl if way.startswith("trl") else train_here
        print(json.dumps(asdict(train(way, folder, Path(scratch), count))))


def run_apart(way: str, folder: Path, count: int) -> Run:
    """Train in one way in a process of its own with one thread."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "benchmarks.train", "--way", way, "--folder", str(folder), "--rows", str(count)]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{way}: {done.stderr[-2000:]}")
    return Run(**json.loads(done.stdout.splitlines()[-1]))


# --------------------------------------------------------------------------------------------------------- measured


def require_equal_losses(folder: Path) -> dict[str, float]:
    """The first step's loss on the same rows in each way.

    Raises:
        SystemExit: those in float32 differ.
    """
    losses = {way: run_apart(way, folder, BATCH).first_loss for way in WAYS}
    reference = losses["trl-tuned"]
    for way, loss in losses.items():
        if way != "trl" and abs(loss - reference) > 1e-5 * max(1.0, reference):
            raise SystemExit(f"{way} has loss {loss} on rows where TRL has {reference}")
    return losses


def measure(model: str, rounds: int, count: int) -> dict[str, Any]:
    """All runs on one model: the ways take turns, so that what else the machine does hits all of them."""
    source, _ = MODELS[model]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        make_model(folder / "model", source)
        make_rows(folder, count)
        losses = require_equal_losses(folder)
        runs: dict[str, list[Run]] = {way: [] for way in WAYS}
        for number in range(rounds):
            for way in WAYS:
                runs[way].append(run_apart(way, folder, count))
                print(f"{model} round {number + 1}: {way} {runs[way][-1].tokens_per_s:.0f} tokens/s", file=sys.stderr)
    if len({run.tokens for way in runs.values() for run in way}) != 1:
        raise SystemExit("the ways did not train the same tokens")
    return {
        "rows": count,
        "tokens": runs["trl"][0].tokens,
        "first_loss": losses,
        "tokens_per_cpu_s": {way: statistics.median(run.tokens_per_s for run in done) for way, done in runs.items()},
        "peak_mb": {way: statistics.median(run.peak_mb for run in done) for way, done in runs.items()},
        "runs": {way: [asdict(run) for run in done] for way, done in runs.items()},
    }


def table(results: dict[str, Any]) -> str:
    """The figures for a reader."""
    lines = [
        f"Fine-tuning on a CPU, one thread, batches of {BATCH} rows, medians ({results['date']})",
        "",
        "| model | way | tokens/CPU-s (min–max) | × TRL as its docs | × TRL tuned | peak MB | loss of 32 rows |",
        "|---|---|---|---|---|---|---|",
    ]
    for model, found in results["models"].items():
        speed = found["tokens_per_cpu_s"]
        for way, title in WAYS.items():
            every = [run["tokens"] / run["cpu_s"] for run in found["runs"][way]]
            lines.append(
                f"| {model} | {title} | {speed[way]:,.0f} ({min(every):,.0f}–{max(every):,.0f}) | "
                f"{speed[way] / speed['trl']:.2f} | {speed[way] / speed['trl-tuned']:.2f} | "
                f"{found['peak_mb'][way]:,.0f} | {found['first_loss'][way]:.6f} |"
            )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one round on few rows; nothing is written")
    parser.add_argument("--model", choices=list(MODELS), help="only this one; nothing is written")
    parser.add_argument("--way", choices=list(WAYS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    if asked.way is not None:
        run_here(asked.way, asked.folder, asked.rows)
        return 0
    names = [asked.model] if asked.model else list(MODELS)
    models = {
        name: measure(name, 1 if asked.quick else asked.rounds, 4 * BATCH if asked.quick else MODELS[name][1])
        for name in names
    }
    results = {
        "date": date.today().isoformat(),
        "machine": platform.processor() or platform.machine(),
        "models": models,
    }
    print(table(results))
    if not asked.quick and asked.model is None:
        (RESULTS / "train.json").write_text(json.dumps(results, indent=1) + "\n", "utf-8")
        (RESULTS / "train.md").write_text(table(results), "utf-8")
    speeds = [found["tokens_per_cpu_s"] for found in models.values()]
    return int(any(speed["ours"] < least * speed[way] for speed in speeds for way, least in TARGETS.items()))


if __name__ == "__main__":
    sys.exit(main())
