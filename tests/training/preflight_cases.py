"""For each pre-flight check a training that it must refuse or warn of, made on disk, and what must not trip it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.config_train import StudentModel
from pipeline.core.record import Message, Record
from pipeline.core.targets import FOLDER, TargetFacts, TargetWriter, TokenLogprobs, tokenizer_digest
from pipeline.stages.train.leakage import compare_splits
from pipeline.student.jobs import TrainJob
from pipeline.student.preflight.findings import Finding
from pipeline.student.preflight.rows import check_rows
from pipeline.student.preflight.survey import read_blocks
from pipeline.student.preflight.targets import Captured
from pipeline.student.preflight.worker import PreflightJob, look
from pipeline.student.shards import Tokens, encode_shards, train_file
from tests.tiny_models import make_tiny_model
from tests.training_rows import small_config, sum_row, write_dataset

Findings = dict[str, Finding]

REASONING = (
    "{% if message['reasoning_content'] %}({{ message['reasoning_content'] }}){% endif %}{{ message['content'] }}"
)


def thinking_row(number: int, **changes: Any) -> Record:
    told = Message("assistant", str(number + 1), reasoning_content=f"{number} and one more")
    return sum_row(number, completion=(told,), **changes)


ROWS = [thinking_row(number) for number in range(24)]
UNSEEN = [
    thinking_row(number, split="validation", prompt=(Message("user", f"Name the day {number} days after Monday."),))
    for number in range(90, 94)
]


def a_model(folder: Path, *, template: Callable[[str], str] = lambda text: text) -> Path:
    """A tiny model whose template writes the teacher's reasoning."""
    make_tiny_model(folder)
    path = folder / "chat_template.jinja"
    path.write_text(template(path.read_text().replace("{{ message['content'] }}", REASONING)))
    return folder


def set_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def a_job(
    folder: Path, model: Path, rows: Sequence[Record], validation: Sequence[Record] = (), **train: Any
) -> TrainJob:
    """A training of these rows, with its folders."""
    for name in ("out", "work"):
        (folder / name).mkdir(parents=True)
    dataset = write_dataset(folder / "dataset", rows, validation)
    config = small_config(**{"max_steps": 2, **train})
    return TrainJob(
        config, StudentModel(model=str(model)), dataset / "data", folder / "out", folder / "work", 1, "test"
    )


def by_id(findings: Iterable[Finding]) -> Findings:
    return {finding.id: finding for finding in findings}


def looked(job: TrainJob, captured: Captured | None = None) -> Findings:
    """What the whole look finds."""
    return by_id(look(PreflightJob(job, captured, 0)).findings)


def looked_at_rows(job: TrainJob, captured: Captured | None = None) -> Findings:
    """What the checks of the rows find."""
    return by_id(check_rows(job, encode_shards(job), captured))


# ------------------------------------------------------------------------------------------------------ soft targets


def write_targets(job: TrainJob, out: Path, *, shifted: int = 0, mass: float = 0.95, scale: str = "raw") -> Captured:
    """Soft targets of all encoded rows: each label with most of the mass, and the token after it in the vocabulary."""
    encode_shards(job)
    rows = [row for batch in read_blocks(train_file(job)) for row in batch.to_pylist()]
    folder = job.student.folder
    assert folder is not None
    facts = TargetFacts(2, {"tiny": tokenizer_digest(folder)}, {"tiny": scale})
    with TargetWriter(out, facts) as writer:
        writer.write([row["row_id"] for row in rows], [_target(row["labels"], shifted, mass) for row in rows])
    return Captured(out / FOLDER, 1.0 if scale == "raw" else 0.7)


def _target(labels: list[int], shifted: int, mass: float) -> TokenLogprobs:
    ids = np.roll(np.array([label for label in labels if label >= 0], np.int32), shifted)
    best = np.log(np.array([mass - 0.05, 0.05], np.float32))
    return TokenLogprobs(
        ids=ids,
        texts=None,
        logprobs=np.full(len(ids), best[0], np.float32),
        ranks=np.ones(len(ids), np.int32),
        sizes=np.full(len(ids), 2, np.int32),
        top_ids=np.stack([ids, (ids + 1) % 300], axis=1).reshape(-1).astype(np.int32),
        top_texts=None,
        top_logprobs=np.tile(best, len(ids)),
    )


# ----------------------------------------------------------------------------------------------------- broken by hand


def rewrite_shard(job: TrainJob, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Write the token shard again with other rows."""
    blocks = list(read_blocks(train_file(job)))
    rows = [change(row) for block in blocks for row in block.to_pylist()]
    with pa.OSFile(str(train_file(job)), "wb") as file, pa.ipc.new_stream(file, blocks[0].schema) as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema=blocks[0].schema))


def encoded(job: TrainJob) -> Tokens:
    return encode_shards(job)


def prompts_as_text(job: TrainJob) -> None:
    """Add a shard whose prompts are texts."""
    (path,) = job.data.glob("train-*.parquet")
    table = pq.read_table(path)
    prompts = pa.array(["What is 1 + 1?"] * table.num_rows)
    at = table.schema.get_field_index("prompt")
    pq.write_table(table.set_column(at, "prompt", prompts), path.with_name("train-00001-of-00002.parquet"))


# ------------------------------------------------------------------------------------------------------ what must trip


def trip_01(folder: Path) -> Finding:
    model = a_model(folder / "model", template=lambda text: text.replace("{{ eos_token }}", ""))
    return looked_at_rows(a_job(folder, model, ROWS))["PF01"]


def trip_02(folder: Path) -> Finding:
    model = a_model(folder / "model")
    set_json(model / "generation_config.json", eos_token_id=0)
    return looked_at_rows(a_job(folder, model, ROWS))["PF02"]


def trip_03(folder: Path) -> Finding:
    job = a_job(folder, a_model(folder / "model"), ROWS)
    tokens = encoded(job)
    cut = write_dataset(folder / "cut", [replace(ROWS[0], finish_reason="length"), *ROWS[1:]])
    return by_id(check_rows(replace(job, data=cut / "data"), tokens))["PF03"]


def trip_04(folder: Path) -> Finding:
    model = a_model(folder / "model", template=lambda text: "{{ bos_token }}" + text)
    return looked_at_rows(a_job(folder, model, ROWS))["PF04"]


def trip_06(folder: Path) -> Finding:
    job = a_job(folder, a_model(folder / "model"), ROWS)
    tokens = encoded(job)
    rewrite_shard(job, lambda row: {**row, "labels": row["input_ids"]})
    return by_id(check_rows(job, tokens))["PF06"]


def trip_07(folder: Path) -> Finding:
    job = a_job(folder, a_model(folder / "model"), ROWS)
    prompts_as_text(job)
    return looked(job)["PF07"]


def trip_08(folder: Path) -> Finding:
    model = a_model(folder / "model")
    other = (model / "chat_template.jinja").read_text().replace("<|assistant|>", "<|system|>")
    set_json(model / "tokenizer_config.json", chat_template=other)
    return looked_at_rows(a_job(folder, model, ROWS))["PF08"]


def trip_09(folder: Path) -> Finding:
    plain = [sum_row(number) for number in range(40, 60)]
    return looked_at_rows(a_job(folder, make_tiny_model(folder / "model"), [*ROWS, *plain]))["PF09"]


def add_token(model: Path, text: str) -> None:
    """Another special token, which the model has no embedding for."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"additional_special_tokens": [text]})
    tokenizer.save_pretrained(model)


def trip_10(folder: Path) -> Finding:
    model = a_model(folder / "model", template=lambda text: text.replace("({{", "<think>{{"))
    add_token(model, "<think>")
    return looked_at_rows(a_job(folder, model, ROWS))["PF10"]


def trip_11(folder: Path) -> Finding:
    job = a_job(folder, a_model(folder / "model"), ROWS)
    return looked_at_rows(job, write_targets(job, folder, shifted=1))["PF11"]


def trip_15(folder: Path) -> Finding:
    import torch
    from transformers import AutoModelForCausalLM

    path = a_model(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("inf")
    model.save_pretrained(path)
    return looked(a_job(folder, path, ROWS))["PF15"]


def trip_16(folder: Path) -> Finding:
    import torch
    from transformers import AutoModelForCausalLM

    path = a_model(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        model.get_input_embeddings().weight[5] *= 0.1  # <|assistant|>
    model.save_pretrained(path)
    return looked(a_job(folder, path, ROWS, tuning={"kind": "lora", "train_tokens": []}))["PF16"]


def trip_17(folder: Path) -> Finding:
    model = a_model(folder / "model", template=lambda text: text.replace("({{", "<|thought|>{{"))
    add_token(model, "<|thought|>")
    return looked(a_job(folder, model, ROWS))["PF17"]


def trip_19(folder: Path) -> Finding:
    job = a_job(folder, a_model(folder / "model"), ROWS)
    return looked_at_rows(job, write_targets(job, folder, scale="scaled"))["PF19"]


def trip_20(folder: Path) -> Finding:
    brief = Message("system", "Be brief.")
    rows = [replace(row, prompt=(brief, *row.prompt)) if at % 2 else row for at, row in enumerate(ROWS)]
    return looked_at_rows(a_job(folder, a_model(folder / "model"), rows))["PF20"]


def trip_21(folder: Path) -> Finding:
    seen = [replace(row, row_id=f"{at:032x}", split="validation") for at, row in enumerate(ROWS[:4], 1000)]
    job = a_job(folder, a_model(folder / "model"), ROWS, seen)
    compare_splits(job.data, job.workdir)
    return looked_at_rows(job)["PF21"]


def trip_22(folder: Path) -> Finding:
    import torch

    from pipeline.student.memory import estimate
    from pipeline.student.preflight.memory import check_memory

    vast = {"batch_size": 10**7, "micro_batch_size": 10**7, "max_steps": 1}
    job = a_job(folder, a_model(folder / "model"), ROWS, **vast)
    return check_memory(estimate(job, longest=64, device=torch.device("cpu")))


def trip_23(folder: Path) -> Finding:
    long = [sum_row(number, completion=(Message("assistant", "word " * 99),)) for number in range(70, 74)]
    return looked_at_rows(a_job(folder, a_model(folder / "model"), [*ROWS, *long]))["PF23"]


def rejected_all(folder: Path) -> Finding:
    return looked(a_job(folder, a_model(folder / "model"), ROWS, max_length=8))["PF23"]
