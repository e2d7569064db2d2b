"""`configs/quickstart-lora.yaml`: the quickstart's data, trained with adapters into a plain model.

The teacher's answers are replaced by the references, since vLLM takes minutes; the rest is as the config says, on a few
hundred prompts and a few steps.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.core.config_base import identity
from pipeline.core.load import load_config
from pipeline.runner.steps import STAGES
from tests.support import run_cli

LORA, FULL = "configs/quickstart-lora.yaml", "configs/quickstart.yaml"
SHARED = ("prompts", "generate", "filter", "dedup", "dataset")
PROMPTS = 400


def test_it_asks_for_the_same_data_as_the_quickstart(root: Path) -> None:
    """So that the steps before the training are found, whichever of the two runs first."""
    lora, full = (load_config(root / name).config for name in (LORA, FULL))
    stages = {spec.kind: spec for spec in STAGES}
    for kind in SHARED:
        assert identity(stages[kind].config(lora)) == identity(stages[kind].config(full)), kind
    assert lora.train.tuning.kind == "lora" and full.train.tuning.kind == "full"


@pytest.fixture(scope="module")
def run(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of all steps."""
    folder = tmp_path_factory.mktemp("lora")
    config = yaml.safe_load((root / LORA).read_text("utf-8"))
    lines = (root / config["prompts"]["sets"]["quickstart"]["source"]["path"]).read_text("utf-8").splitlines()
    rows = folder / "rows.jsonl"
    rows.write_text("\n".join(lines[:: len(lines) // PROMPTS]) + "\n", "utf-8")
    config["teachers"] = {
        "tiny": {
            "kind": "replay",
            "path": str(rows),
            "completion": "answer",
            "origin": "the prompts' own references",
            "license": "CC0-1.0",
        }
    }
    config["prompts"]["sets"]["quickstart"]["source"]["path"] = str(rows)
    config["train"] |= {"max_steps": 12, "log_steps": 1}
    config["evaluate"] |= {"speed_prompts": 8, "speed_passes": 1, "base_prompts": 8, "max_prompts": 8}
    path = folder / "lora.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False), "utf-8")
    done = run_cli("run", path, "--data", folder / "data", cwd=root, timeout=500)
    assert done.returncode == 0, done.stderr
    (found,) = (folder / "data" / "runs").iterdir()
    return found


def manifest(run: Path, step: str) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((run / step / "manifest.json").read_text("utf-8"))
    return read


def test_adapters_and_embeddings_are_trained(run: Path) -> None:
    metrics = manifest(run, "train")["metrics"]
    assert metrics["parameters"] == 520_032
    assert metrics["trainable_parameters"] < metrics["parameters"] / 2
    losses = [
        point["loss"] for point in json.loads((run / "train" / "loss.json").read_text("utf-8")) if "loss" in point
    ]
    assert len(losses) == 12
    assert losses[-1] < losses[0] / 2


def test_the_student_is_a_plain_model_of_the_bases_size(run: Path, root: Path) -> None:
    from safetensors import safe_open

    base, student = root / "data/models/tiny-base/model.safetensors", run / "train/model/model.safetensors"
    with safe_open(base, "pt") as before, safe_open(student, "pt") as after:
        assert set(after.keys()) == set(before.keys())
        changed = {name for name in after.keys() if not after.get_tensor(name).equal(before.get_tensor(name))}  # noqa: SIM118
    names = {name.split(".")[-2] for name in changed}
    assert names == {"embed_tokens", *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")}
    assert not [path.name for path in (run / "train/model").iterdir() if "adapter" in path.name]


def test_the_adapter_lies_beside_it(run: Path, root: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config = json.loads((run / "train/adapter/adapter_config.json").read_text("utf-8"))
    assert config["base_model_name_or_path"] == "local"
    base = AutoModelForCausalLM.from_pretrained(root / "data/models/tiny-base", dtype=torch.float32)
    student = AutoModelForCausalLM.from_pretrained(run / "train/model", dtype=torch.float32)
    ids = torch.arange(100, 120)[None]
    with torch.no_grad():
        expected = student(input_ids=ids).logits
        found = PeftModel.from_pretrained(base, run / "train/adapter")(input_ids=ids).logits
    # The base is stored in bfloat16, and so is the merged model: 8 bits of each weight.
    torch.testing.assert_close(found, expected, atol=0.05 * float(expected.abs().max()), rtol=0)


def test_it_verifies(run: Path, root: Path) -> None:
    done = run_cli("verify", "--data", run.parents[1], cwd=root, timeout=200)
    assert done.returncode == 0, done.stderr


def test_it_is_evaluated_and_reported(run: Path) -> None:
    evaluation = json.loads((run / "evaluate" / "evaluation.json").read_text("utf-8"))
    assert evaluation["n"] == 8
    assert evaluation["student"]["parameters"] == 520_032
    assert (run / "report" / "report.html").is_file()
