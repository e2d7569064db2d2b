"""Each of the 23 pre-flight checks sees what it is there for, and a sound training passes all of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import UsageError
from pipeline.core.record import Message
from pipeline.stages.train.leakage import compare_splits
from pipeline.student.preflight.findings import NAMES, Finding, accept, refuse
from pipeline.student.worker import run_job
from tests.training import broken_trainers as broken
from tests.training import preflight_cases as cases
from tests.training.preflight_cases import ROWS, UNSEEN, Findings, a_job, a_model, looked, looked_at_rows, write_targets

Trip = Callable[[Path], Finding]

TRIPS: dict[str, tuple[str, str, Trip]] = {
    "PF01": ("error", "never learn to stop: 24 of 24 rows do not end with", cases.trip_01),
    "PF02": ("error", "ends a turn with </s>, and generation stops at", cases.trip_02),
    "PF03": ("error", "1 completions were cut", cases.trip_03),
    "PF04": ("error", "24 of 24 rows begin with two BOS tokens", cases.trip_04),
    "PF05": ("error", "4 of 4 rows lose the label of their end, which is the padding token", broken.trip_05),
    "PF06": ("error", "24 rows train their prompt", cases.trip_06),
    "PF07": ("error", "'prompt' of train-00001-of-00002.parquet is string", cases.trip_07),
    "PF08": ("error", "tokenizer_config.json writes another prompt", cases.trip_08),
    "PF09": ("warning", "leaves out the reasoning of 24 rows", cases.trip_09),
    "PF10": ("warning", "<think> are special tokens", cases.trip_10),
    "PF11": ("error", "24 of 24 rows are of other tokens than their labels", cases.trip_11),
    "PF12": ("error", "the tokens of a row are not in the batch", broken.trip_12),
    "PF13": ("error", "labels at a neighbour's place have a lower loss", broken.trip_13),
    "PF14": ("error", "are not the same step", broken.trip_14),
    "PF15": ("error", "the loss is not finite for 8 of the 8 rows", cases.trip_15),
    "PF16": ("error", "writes <|assistant|>, which the base never learnt", cases.trip_16),
    "PF17": ("error", "the rows hold the id 300, and the model has 300 embeddings", cases.trip_17),
    "PF18": ("error", "rows that share a sequence see each other", broken.trip_18),
    "PF19": ("error", "were divided by the temperature 0.7", cases.trip_19),
    "PF20": ("warning", "12 of 24 rows have a system message", cases.trip_20),
    "PF21": ("error", "4 validation prompts are trained on", cases.trip_21),
    "PF22": ("error", "of what the device has", cases.trip_22),
    "PF23": ("warning", "14.3% of the rows are not trained: 4 over_length", cases.trip_23),
}
"""Check -> level and message of what trips it."""


def test_there_are_23_checks_and_each_is_tried() -> None:
    assert [*NAMES] == [f"PF{number:02d}" for number in range(1, 24)] == [*TRIPS]


@pytest.mark.parametrize("id_", [*NAMES])
def test_what_must_trip_a_check_does(id_: str, tmp_path: Path) -> None:
    level, message, trip = TRIPS[id_]
    finding = trip(tmp_path)
    assert (finding.id, finding.level) == (id_, level), finding
    assert message in finding.message
    assert finding.figure and finding.fix


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Findings:
    """Adapters, packed rows, reasoning, soft targets, validation rows: all that is looked at is there, and right."""
    folder = tmp_path_factory.mktemp("sound")
    job = a_job(folder, a_model(folder / "model"), ROWS, UNSEEN, tuning={"kind": "lora"}, packing=True)
    compare_splits(job.data, job.workdir)
    return looked(job, write_targets(job, folder))


@pytest.mark.parametrize("id_", [*NAMES])
def test_a_sound_training_does_not_trip_it(id_: str, sound: Findings) -> None:
    assert sound[id_].level == "ok", sound[id_]
    assert sound[id_].figure not in ("", "-")


class TestMoreThatTrips:
    def test_no_row_at_all(self, tmp_path: Path) -> None:
        finding = cases.rejected_all(tmp_path)
        assert finding.level == "error" and "no row is left to train on" in finding.message

    def test_a_generation_prompt_that_no_answer_begins_with(self, tmp_path: Path) -> None:
        opens = "{% if add_generation_prompt %}<think>{% endif %}"
        model = a_model(tmp_path / "model", template=lambda text: text + opens)
        found = looked_at_rows(a_job(tmp_path, model, [*ROWS]))
        assert found["PF23"].level == "error", "no row is left, so nothing else is looked at"
        assert set(found) == {"PF07", "PF23"}

    def test_another_template_that_refuses_the_conversation(self, tmp_path: Path) -> None:
        model = a_model(tmp_path / "model")
        cases.set_json(model / "tokenizer_config.json", chat_template="{{ raise_exception('No such role!') }}")
        finding = looked_at_rows(a_job(tmp_path, model, ROWS))["PF08"]
        assert finding.level == "error" and len(finding.rows) == 3
        assert "tokenizer_config.json refuses this conversation (No such role!)" in finding.message

    @pytest.mark.parametrize(("mass", "message"), [(1.2, "are no probabilities")])
    def test_soft_targets_that_are_no_distribution(self, tmp_path: Path, mass: float, message: str) -> None:
        job = a_job(tmp_path, a_model(tmp_path / "model"), ROWS)
        finding = looked_at_rows(job, write_targets(job, tmp_path, mass=mass))["PF11"]
        assert finding.level == "error" and message in finding.message

    def test_a_teacher_with_another_tokenizer_is_not_compared(self, tmp_path: Path) -> None:
        job = a_job(tmp_path, a_model(tmp_path / "model"), ROWS)
        captured = write_targets(job, tmp_path)
        cases.add_token(tmp_path / "model", "<|other|>")
        assert looked_at_rows(job, captured)["PF11"].level == "not_applicable"

    def test_a_block_whose_adapters_are_frozen(self, tmp_path: Path) -> None:
        from pipeline.student.preflight.adapted import check_adapters

        trainer = broken.broken(tmp_path, tuning={"kind": "lora"})
        for name, parameter in trainer.model.named_parameters():
            if ".layers.1." in name:
                parameter.requires_grad_(False)
        tuning = cases.small_config(tuning={"kind": "lora"}).tuning
        finding = check_adapters(trainer.model, trainer.processing_class, (2,), tuning)
        assert finding.level == "error" and "in the blocks 1" in finding.message


@pytest.mark.parametrize("name", ["thinking", "reasoning"])
def test_thinking_in_earlier_turns_is_served_in_the_field_that_the_template_reads(tmp_path: Path, name: str) -> None:
    asked, thought = Message("user", "1 + 1?"), Message("assistant", "2", reasoning_content="one and one")
    rows = [replace(row, prompt=(asked, thought, *row.prompt)) for row in ROWS]
    model = a_model(tmp_path / "model", template=lambda text: text.replace("reasoning_content", name))
    found = looked_at_rows(a_job(tmp_path, model, rows, max_length=200))
    assert (found["PF06"].level, found["PF08"].level) == ("ok", "ok")


class TestTheBestWeights:
    """Of a training that keeps them, and that nothing could tell."""

    @pytest.mark.parametrize("start", [lambda job: run_job(job, lambda report: None), looked], ids=["train", "command"])
    @pytest.mark.parametrize(
        ("validation", "message"),
        [
            ([], "the data set has no validation row"),
            (ROWS[:3], "none of the 3 validation rows can be used"),
        ],
        ids=["none", "too long"],
    )
    def test_are_refused_before_any_weight_is_loaded(
        self, tmp_path: Path, validation: list[Any], message: str, start: Callable[[Any], object]
    ) -> None:
        long = Message("assistant", "word " * 99)
        unseen = [
            replace(row, row_id=f"{at:032x}", split="validation", completion=(long,))
            for at, row in enumerate(validation, 1000)
        ]
        model = a_model(tmp_path / "model")
        (model / "model.safetensors").unlink()
        with pytest.raises(UsageError, match=message) as refused:
            start(a_job(tmp_path, model, ROWS, unseen, evaluation={"keep": "best"}))
        assert refused.value.where == "train.evaluation"


class TestATraining:
    def test_findings_are_kept_beside_the_model_and_counted(self, tmp_path: Path) -> None:
        job = a_job(tmp_path, a_model(tmp_path / "model"), ROWS, max_steps=1)
        reports: list[dict[str, Any]] = []
        found = run_job(job, lambda report: reports.append(report))
        kept = json.loads((job.out / "preflight.json").read_text())
        assert [each["id"] for each in kept] == [*NAMES]
        counts = found["metrics"]["preflight"]  # type: ignore[index, call-overload]
        assert counts["ok"] + len(counts["not_applicable"]) == 23  # type: ignore[index, call-overload, operator, arg-type]
        (told,) = [report for report in reports if "preflight" in report]
        assert told == {"preflight": counts, "findings": []}

    def test_an_error_stops_it_before_any_weight_is_loaded(self, tmp_path: Path) -> None:
        model = a_model(tmp_path / "model", template=lambda text: "{{ bos_token }}" + text)
        (model / "model.safetensors").unlink()
        job = a_job(tmp_path, model, ROWS)
        with pytest.raises(UsageError, match="two BOS tokens") as refused:
            run_job(job, lambda report: None)
        assert "PF04" in refused.value.where and len(str(refused.value).splitlines()) == 3
        levels = {each["id"]: each["level"] for each in json.loads((job.workdir / "preflight.json").read_text())}
        assert (levels["PF04"], levels["PF15"]) == ("error", "not_applicable")

    def test_an_accepted_error_is_a_warning(self, tmp_path: Path) -> None:
        model = a_model(tmp_path / "model", template=lambda text: "{{ bos_token }}" + text)
        job = a_job(tmp_path, model, ROWS, max_steps=1, accept_findings=["PF04"])
        reports: list[dict[str, Any]] = []
        run_job(job, lambda report: reports.append(report))
        (told,) = [report for report in reports if "preflight" in report]
        assert told["preflight"]["accepted"] == ["PF04"] and told["preflight"]["errors"] == []
        assert "warning" in told["findings"][0] and "accepted" in told["findings"][0]

    def test_that_no_row_is_left_cannot_be_accepted(self, tmp_path: Path) -> None:
        job = a_job(tmp_path, a_model(tmp_path / "model"), ROWS, max_length=8, accept_findings=["PF23"])
        with pytest.raises(UsageError, match="no row is left to train on") as refused:
            run_job(job, lambda report: None)
        assert "pre-flight check PF23" in refused.value.where

    def test_the_checks_change_nothing(self, tmp_path: Path) -> None:
        """Random states, gradients and counts are as if nobody had looked: dropout falls as it would have."""
        import torch

        from pipeline.student.memory import estimate
        from pipeline.student.preflight.model import check_model, loaded_of
        from pipeline.student.shards import encode_shards

        job = a_job(tmp_path, a_model(tmp_path / "model"), ROWS, tuning={"kind": "lora", "dropout": 0.5}, packing=True)
        trainer = broken.a_trainer(job)
        memory = estimate(job, longest=64, device=torch.device("cpu"))
        before = torch.get_rng_state(), {name: each.clone() for name, each in trainer.model.state_dict().items()}
        training = trainer.model.training
        check_model(loaded_of(trainer, job, encode_shards(job), memory))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert all(torch.equal(each, before[1][name]) for name, each in trainer.model.state_dict().items())
        assert all(each.grad is None for each in trainer.model.parameters())
        assert trainer.model.training == training and trainer.step_rows == trainer.step_losses == []


def test_the_first_error_is_told_and_how_many_more() -> None:
    errors = [Finding(id_, NAMES[id_], "error", "1", f"flaw {id_}", f"mend {id_}", ("r1",)) for id_ in ("PF02", "PF08")]
    with pytest.raises(UsageError) as refused:
        refuse(errors)
    assert refused.value.what == "flaw PF02" and refused.value.todo == "mend PF02"
    assert "1 more: PF08" in refused.value.where and "r1" in refused.value.where
    with pytest.raises(UsageError, match="flaw PF08"):
        refuse(errors, ["PF02"])
    refuse(errors, ["PF02", "PF08"])
    assert [each.level for each in accept(errors, ["PF08"])] == ["error", "warning"]
