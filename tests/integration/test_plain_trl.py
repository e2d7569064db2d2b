"""The shards train with `datasets` and TRL alone: nothing of this package is importable where they are used."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from pipeline.core.record import RECORD_SCHEMA, Message, ShardWriter, to_table
from pipeline.stages import dataset
from tests.support import a_record, dataset_step, make_context
from tests.tiny_models import make_tiny_model

SCRIPT = """
import importlib.util, json, sys
assert importlib.util.find_spec("pipeline") is None, "the package is on the path"
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

shards, model, out = sys.argv[1:]
files = {split: f"{shards}/{split}-*.parquet" for split in ("train", "validation")}
rows = load_dataset("parquet", data_files=files, cache_dir=f"{out}/cache")
args = SFTConfig(
    output_dir=out, max_steps=2, per_device_train_batch_size=2, max_length=256, report_to=[], use_cpu=True, bf16=False,
    gradient_checkpointing=False, logging_steps=1, save_strategy="no", disable_tqdm=True, learning_rate=1e-2,
)
trainer = SFTTrainer(model=model, args=args, train_dataset=rows["train"], eval_dataset=rows["validation"])
labels = trainer.train_dataset[0]["labels"]
learned = trainer.processing_class.decode([token for token in labels if token != -100])
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(json.dumps({"losses": losses, "rows": len(rows["train"]), "learned": learned}))
"""


@pytest.mark.skipif(find_spec("trl") is None, reason="needs TRL: the extra `train` installs it")
@pytest.mark.parametrize("reasoning", [None, "One and one make two."])
def test_shards_train_without_our_package(tmp_path: Path, reasoning: str | None) -> None:
    rows = [
        a_record(
            row_id=f"{number:032x}",
            split="validation" if number >= 8 else "train",
            completion=(Message("assistant", f"It is {number}.", reasoning),),
            license_set=("MIT", "unknown"),
            task=None if number % 2 else "sums",
        )
        for number in range(10)
    ]
    with ShardWriter(tmp_path / "up" / "rows", RECORD_SCHEMA) as writer:
        writer.write(to_table(RECORD_SCHEMA, rows))
    (tmp_path / "up" / "sources.json").write_text("{}", "utf-8")
    (tmp_path / "out").mkdir()
    cfg = dataset_step(shard_rows=3)
    dataset.run(cfg, {"dedup": tmp_path / "up", "prompts": tmp_path / "up"}, tmp_path / "out", make_context(tmp_path))
    model = make_tiny_model(tmp_path / "model", 0)

    script = tmp_path / "elsewhere" / "train.py"
    script.parent.mkdir()
    script.write_text(SCRIPT, "utf-8")
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "WORLD_SIZE", "RANK")}
    done = subprocess.run(
        [sys.executable, "-P", str(script), str(tmp_path / "out" / "data"), str(model), str(tmp_path / "trained")],
        cwd=script.parent,
        env={**clean, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["rows"] == 8
    assert len(report["losses"]) == 2 and all(0 < loss < 20 for loss in report["losses"])
    assert report["learned"].startswith("It is ") and report["learned"].endswith("</s>")  # the completion alone
