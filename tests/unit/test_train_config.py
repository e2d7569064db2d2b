"""How a config becomes a training: explicit arguments, whole batches, an order of its own, a launch of that size."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from pipeline.core.config import TrainStep
from pipeline.core.config_base import identity
from pipeline.core.config_policy import PolicyConfig
from pipeline.core.config_train import CHECK_IDS, CourseEvaluation, LoraTuning, StudentModel, TrainConfig
from pipeline.core.errors import UsageError
from pipeline.core.record import Message
from pipeline.stages import train
from pipeline.student.arguments import Schedule, schedule, sft_arguments
from pipeline.student.jobs import TrainJob, launch_id
from pipeline.student.order import count_steps, epoch_ends, training_order
from pipeline.student.preflight.findings import NAMES
from pipeline.student.shards import encode_shards
from tests.support import POLICY, make_context
from tests.tiny_models import make_tiny_model
from tests.training_rows import ROOT, small_config, sum_row, write_dataset

# Where and how often things are written, how processes talk to each other, and where Accelerate's environment decides.
NOT_SHAPING = {
    *("output_dir", "do_train", "do_eval", "do_predict", "debug", "local_rank", "skip_memory_metrics"),
    *("log_level", "log_level_replica", "log_on_each_node", "include_num_input_tokens_seen", "run_name", "project"),
    *("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "logging_steps"),
    *("eval_steps", "eval_delay", "eval_on_start", "eval_do_concat_batches", "eval_use_gather_object"),
    *("eval_accumulation_steps", "include_for_metrics", "batch_eval_metrics"),
    *("save_steps", "save_only_model", "save_on_each_node", "save_total_limit", "enable_jit_checkpoint"),
    *("metric_for_best_model", "greater_is_better", "restore_callback_states_from_checkpoint"),
    *("hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push", "hub_revision"),
    *("dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor"),
    *("dataloader_multiprocessing_context", "dataset_num_proc", "torch_empty_cache_steps"),
    *("ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph", "ddp_backend", "ddp_timeout"),
    *("fsdp", "fsdp_config", "deepspeed"),
    "pad_token",  # deprecated: giving it a value warns
}


def arguments() -> dict[str, object]:
    return sft_arguments(small_config(), Schedule(10, 1, 4, 2), scratch=Path("scratch"), use_cpu=True)


def test_every_argument_that_shapes_a_result_is_explicit() -> None:
    from trl import SFTConfig

    known = {field.name for field in dataclasses.fields(SFTConfig)}
    assert len(known) >= 130, f"found {len(known)} arguments"
    explicit = set(arguments())
    assert sorted(explicit - known) == [], "TRL does not know these"
    assert sorted(known - explicit - NOT_SHAPING) == [], "a library default would decide these"
    assert sorted(NOT_SHAPING - known) == [], "TRL has no such argument any more"


def test_the_loss_is_averaged_over_the_tokens_of_all_processes() -> None:
    # Else a process with few tokens would weigh as much as one with many, and two would not train like one.
    assert arguments()["average_tokens_across_devices"] is True


def test_trl_takes_the_arguments_as_they_are(tmp_path: Path) -> None:
    from trl import SFTConfig

    given = {**arguments(), "output_dir": str(tmp_path)}
    config = SFTConfig(**given)
    changed = {name: getattr(config, name) for name, value in given.items() if getattr(config, name) != value}
    for name in ("accelerator_config", "report_to"):  # become an object, and the list of none
        changed.pop(name)
    assert {name: str(value) for name, value in changed.items()} == {}


def test_a_batch_is_divided_among_processes_and_passes() -> None:
    cfg = small_config(batch_size=64, micro_batch_size=4, warmup_share=0.1)
    assert schedule(cfg, steps=100, world_size=2) == Schedule(100, 10, 4, 8)
    with pytest.raises(UsageError, match=r"batch_size 64 cannot be shared by 3 processes"):
        schedule(cfg, steps=100, world_size=3)


@pytest.mark.parametrize(
    ("most", "world_size", "rows", "passes"),
    [(64, 1, 64, 1), (64, 2, 32, 1), (7, 1, 4, 16), (48, 2, 32, 1), (1, 4, 1, 16)],
)
def test_a_pass_takes_as_many_rows_as_it_may_in_equal_parts(most: int, world_size: int, rows: int, passes: int) -> None:
    plan = schedule(small_config(batch_size=64, micro_batch_size=most), steps=1, world_size=world_size)
    assert (plan.micro_batch_size, plan.accumulation) == (rows, passes)


def test_a_batch_that_cannot_be_divided_is_refused_with_the_config() -> None:
    with pytest.raises(ValidationError, match=r"batch_size 8 cannot be shared by 3 processes"):
        TrainConfig.model_validate({"batch_size": 8, "processes": 3})


def test_what_training_reads_is_known_before_anything_runs(tmp_path: Path) -> None:
    cfg = TrainStep(
        train=small_config(accelerate=tmp_path / "a.yaml"),
        student=StudentModel(model=str(tmp_path)),
        policy=PolicyConfig.model_validate(POLICY),
    )
    assert train.input_files(cfg) == {"train.accelerate": tmp_path / "a.yaml", "student.model": tmp_path}
    hub = TrainStep(
        train=small_config(),
        student=StudentModel(model="org/model", revision="abc"),
        policy=PolicyConfig.model_validate(POLICY),
    )
    assert set(train.input_files(hub)) == {"train.accelerate"}


def test_the_students_licence_does_not_train_anew() -> None:
    steps = [
        TrainStep(
            train=small_config(),
            student=StudentModel(model="./x", license=name),
            policy=PolicyConfig.model_validate(POLICY),
        )
        for name in ("MIT", "unknown")
    ]
    assert identity(steps[0]) == identity(steps[1])


def test_a_row_that_the_student_has_no_positions_for_is_too_long(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "base")  # of 512 positions
    long = sum_row(2, completion=(Message("assistant", "x" * 600),))
    data = write_dataset(tmp_path / "dataset", [sum_row(1), long]) / "data"
    (tmp_path / "work").mkdir()
    cfg = small_config(max_length=4096)
    job = TrainJob(cfg, StudentModel(model=str(model)), data, tmp_path / "out", tmp_path / "work", 1, "launch")
    tokens = encode_shards(job)
    assert tokens.rejected == {"over_length": 1}
    assert tokens.checks["length_limit"] == 512


def test_rows_that_would_teach_something_else_are_counted(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "base")
    rows = [
        sum_row(1),
        sum_row(2, completion=(Message("assistant", "3</s>"),)),
        sum_row(3, completion=(Message("assistant", "4", "Three and one."),)),
    ]
    data = write_dataset(tmp_path / "dataset", rows) / "data"
    (tmp_path / "work").mkdir()
    cfg = small_config(end_tokens=["</s>"])
    job = TrainJob(cfg, StudentModel(model=str(model)), data, tmp_path / "out", tmp_path / "work", 1, "x")
    tokens = encode_shards(job)
    assert tokens.rejected == {"reasoning_dropped": 1}
    counted = {"rows_in": 3, "rows": 2, "reasoning_dropped": 1, "end_tokens_cut": 1, "neutralised_rows": 0}
    assert {name: tokens.checks[name] for name in counted} == counted


@pytest.mark.parametrize(
    ("epochs", "max_steps", "steps"), [(1, None, 13), (2, None, 25), (0.5, None, 7), (2, 5, 5), (1, 100, 13)]
)
def test_steps(epochs: float, max_steps: int | None, steps: int) -> None:
    assert count_steps(100, epochs=epochs, batch_size=8, max_steps=max_steps) == steps


def test_each_epoch_holds_each_row_once() -> None:
    lengths = np.arange(96)
    order = training_order(lengths, steps=24, batch_size=8, seed=0, group_by_length=False)
    for epoch in (order[:96], order[96:]):
        assert sorted(epoch) == list(range(96))
    assert list(order[:96]) != list(order[96:])


def test_batches_hold_rows_of_similar_length() -> None:
    lengths = np.random.default_rng(0).integers(1, 1000, 4096)
    spread = {}
    for grouped in (False, True):
        order = training_order(lengths, steps=64, batch_size=64, seed=0, group_by_length=grouped)
        assert sorted(order) == list(range(4096))
        batches = lengths[order].reshape(-1, 64)
        spread[grouped] = float((batches.max(axis=1) - batches.min(axis=1)).mean())
        assert np.corrcoef(batches.mean(axis=1), np.arange(64))[0, 1] < 0.5, "lengths must not grow along the training"
    assert spread[True] < spread[False] / 5


def test_the_seed_decides_the_order() -> None:
    lengths = np.full(40, 7)
    orders = [list(training_order(lengths, steps=5, batch_size=8, seed=s, group_by_length=True)) for s in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_fewer_rows_than_a_batch() -> None:
    order = training_order(np.array([3, 4, 5]), steps=2, batch_size=8, seed=0, group_by_length=True)
    assert len(order) == 16 and set(order) == {0, 1, 2}


def test_validation_loss_is_taken_where_epochs_end() -> None:
    assert epoch_ends(100, steps=25, batch_size=8) == {13, 25}
    assert epoch_ends(100, steps=7, batch_size=8) == {7}


def test_the_job_survives_its_file(tmp_path: Path) -> None:
    student = StudentModel(model="org/model", revision="abc", license="MIT")
    cfg = small_config(tuning={"kind": "lora", "target_modules": ["q_proj"]})
    job = TrainJob(cfg, student, tmp_path / "data", tmp_path / "out", tmp_path, 2, "launch")
    job.write(tmp_path / "worker.json")
    assert TrainJob.read(tmp_path / "worker.json") == job


def test_processes_of_one_launch_agree_on_its_name() -> None:
    told = {"TORCHELASTIC_RUN_ID": "run", "MASTER_PORT": "29500"}
    assert launch_id(told) == launch_id(told)
    assert launch_id(told) != launch_id({**told, "MASTER_PORT": "29501"})


@pytest.mark.parametrize(
    ("file", "processes", "multi_gpu"), [("cpu", 1, False), ("cpu", 2, True), ("ddp", 2, False), ("fsdp2", 2, False)]
)
def test_the_launch_starts_as_many_processes_as_asked(file: str, processes: int, multi_gpu: bool) -> None:
    path = ROOT / "configs" / "accelerate" / f"{file}.yaml"
    cfg = small_config(processes=processes, micro_batch_size=4, accelerate=path, threads=3)
    command = train.launch_command(cfg, train.read_accelerate(path), Path("worker.json"))
    assert command[0] == sys.executable
    assert command[command.index("--num_processes") + 1] == str(processes)
    assert command[command.index("--num_cpu_threads_per_process") + 1] == "3"
    assert ("--multi_gpu" in command) is multi_gpu


def test_every_accelerate_config_is_read() -> None:
    files = sorted((ROOT / "configs" / "accelerate").glob("*.yaml"))
    assert {file.stem for file in files} == {"cpu", "ddp", "ddp-multi-node", "fsdp2", "fsdp2-multi-node", "single"}
    for file in files:
        assert train.read_accelerate(file)["compute_environment"] == "LOCAL_MACHINE"


def test_a_missing_accelerate_config(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Accelerate's config cannot be read"):
        train.read_accelerate(tmp_path / "none.yaml")


@pytest.mark.parametrize("given", [{"min_delta": 1}, {"by": "accuracy", "generate": {}}])
def test_what_only_decides_is_refused_where_nothing_is_decided(given: dict[str, Any]) -> None:
    name = next(iter(given))
    with pytest.raises(ValidationError, match=f"{name} would do nothing.*give `keep: best` or `patience` too"):
        CourseEvaluation.model_validate(given)
    for decides in ({"keep": "best"}, {"patience": 2}):
        CourseEvaluation.model_validate(given | decides)


def test_an_evaluation_that_decides_nothing_survives_its_file() -> None:
    plain = CourseEvaluation.model_validate({"generate": {}})
    assert CourseEvaluation.model_validate(plain.model_dump()) == plain


@pytest.mark.parametrize(
    ("id_", "hint"),
    [
        ("PF8", "did you mean 'PF08'? "),
        ("pf08", "did you mean 'PF08'? "),
        ("pf21", "did you mean 'PF21'? "),
        ("PF24", "did you mean 'PF23'? "),
        ("nonsense", ""),
    ],
)
def test_an_accepted_finding_that_is_none_is_refused_with_those_that_are(id_: str, hint: str) -> None:
    with pytest.raises(ValidationError) as caught:
        TrainConfig.model_validate({"accept_findings": ["PF01", id_]})
    assert f"no pre-flight check has this id; {hint}they are PF01 to PF23" in str(caught.value)


def test_the_config_knows_the_ids_of_all_checks() -> None:
    assert tuple(NAMES) == CHECK_IDS


def test_no_adapter_on_the_output_layer(tmp_path: Path) -> None:
    tuning = LoraTuning(kind="lora", target_modules=("q_proj", "lm_head"))
    cfg = TrainStep(
        train=small_config(tuning=tuning),
        student=StudentModel(model=str(tmp_path)),
        policy=PolicyConfig.model_validate(POLICY),
    )
    dataset = write_dataset(tmp_path / "dataset", [sum_row(1)])
    with pytest.raises(UsageError, match="lm_head cannot have an adapter"):
        train.run(cfg, {"dataset": dataset}, tmp_path / "out", make_context(tmp_path))
