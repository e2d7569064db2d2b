"""Soft targets from a real vLLM server with the tiny teacher: ids, ranks, and the side file beside the rows."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from pipeline.core.config import GenerateStep
from pipeline.core.record import PROMPT_SCHEMA, Message, ShardWriter, iter_records, to_table
from pipeline.core.stage import Context, Result
from pipeline.core.targets import TokenLogprobs, read_targets, tokenizer_digest
from pipeline.stages import generate
from tests.support import a_prompt, make_context

pytestmark = pytest.mark.vllm

TEACHER = Path("data/models/tiny-teacher")
TOP_K = 8
PROMPTS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a `prompts` artefact; its data folder is shared by the tests."""
    folder = tmp_path_factory.mktemp("soft")
    rows = [
        a_prompt(prompt_id=f"p{i:03d}", group_id=f"g{i}", prompt=(Message("user", f"What is {i} + {i + 3}?"),))
        for i in range(PROMPTS)
    ]
    with ShardWriter(folder / "prompts" / "rows", PROMPT_SCHEMA) as writer:
        writer.write(to_table(PROMPT_SCHEMA, rows))
    return folder


def config(top_k: int | None, **generate_fields: object) -> GenerateStep:
    teacher = {
        "kind": "vllm",
        "model": f"./{TEACHER}",
        "dtype": "float32",
        "license": "Apache-2.0",
        "start_timeout_s": 500,
        "env": {"VLLM_CPU_KVCACHE_SPACE": "1"},
    }
    asked = {} if top_k is None else {"logprobs": {"top_k": top_k}}
    sampling = {"temperature": 2.0, "max_tokens": 24}  # hot, so that sampled tokens lie beyond the best
    return GenerateStep.model_validate(
        {
            "teachers": {"tiny": teacher},
            "generate": {"teacher": "tiny", "sampling": sampling, **asked, **generate_fields},
        }
    )


def context(folder: Path, name: str) -> Context:
    """A context of its own whose data folder is the module's."""
    ctx = make_context(folder / name)
    (folder / "data").mkdir(exist_ok=True)
    (folder / name / "data").symlink_to(folder / "data")
    return ctx


def run(folder: Path, out: str, cfg: GenerateStep) -> tuple[Result, Context]:
    ctx = context(folder, f"of-{out}")
    return generate.run(cfg, {"prompts": folder / "prompts"}, folder / out, ctx), ctx


def asked_of(ctx: Context) -> int:
    """How many rows the teacher was asked for."""
    return sum(fields["asked"] for event, fields in ctx.events.seen if event == "teacher_asked")


@pytest.fixture(scope="module")
def captured(folder) -> tuple[Result, Context]:
    """A run that captures them."""
    result, ctx = run(folder, "soft", config(TOP_K))
    assert asked_of(ctx) == PROMPTS
    return result, ctx


def targets(folder: Path, out: str = "soft") -> dict[str, TokenLogprobs]:
    return dict(read_targets(folder / out / "targets"))


@pytest.mark.timeout(1500)
def test_every_kept_row_has_its_targets_in_the_same_order(folder, captured):
    result, _ = captured
    records = list(iter_records(folder / "soft" / "rows"))
    assert result.rows_out == PROMPTS
    assert [record.row_id for record in records] == [*targets(folder)]
    assert [record.completion_tokens for record in records] == [len(told) for told in targets(folder).values()]


@pytest.mark.timeout(1500)
def test_the_ids_are_those_of_the_answer(folder, captured):
    """Decoded they are its text; nothing is tokenised again."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    told = targets(folder)
    for record in iter_records(folder / "soft" / "rows"):
        ids = told[record.row_id].ids
        assert ids is not None
        assert tokenizer.decode(ids, skip_special_tokens=True) == record.completion[0].content


@pytest.mark.timeout(1500)
def test_there_are_always_so_many_of_the_best_wherever_the_sampled_one_lies(folder, captured):
    ranks = np.concatenate([told.ranks for told in targets(folder).values()])
    assert (ranks == 1).any() and (ranks == 0).any(), "the run has both kinds of tokens"
    for told in targets(folder).values():
        assert set(told.sizes.tolist()) == {TOP_K}
        tops = np.split(told.top_logprobs, np.cumsum(told.sizes)[:-1])
        assert told.top_ids is not None and told.ids is not None
        ids = np.split(told.top_ids, np.cumsum(told.sizes)[:-1])
        for at, (values, names) in enumerate(zip(tops, ids, strict=True)):
            assert (np.diff(values) <= 0).all() and len(set(names.tolist())) == TOP_K
            assert math.fsum(np.exp(values.astype(float))) <= 1.001
            if 0 < told.ranks[at] <= TOP_K:
                assert names[told.ranks[at] - 1] == told.ids[at]
                assert values[told.ranks[at] - 1] == told.logprobs[at]
            else:
                assert told.ids[at] not in names and told.logprobs[at] <= values[-1]


@pytest.mark.timeout(1500)
def test_they_are_the_models_own_at_temperature_1(folder, captured):
    """The same as transformers computes from the weights, for the answer's own ids."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    model = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32).eval()
    record = next(iter_records(folder / "soft" / "rows"))
    told = targets(folder)[record.row_id]
    assert told.ids is not None and told.top_ids is not None
    prompt = [{"role": message.role, "content": message.content} for message in record.prompt]
    before = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([[*before, *told.ids.tolist()]])).logits[0]
    expected = torch.log_softmax(logits[len(before) - 1 : -1].float(), -1).numpy()
    at = np.arange(len(told))
    np.testing.assert_allclose(told.logprobs, expected[at, told.ids], atol=2e-3)
    np.testing.assert_allclose(told.top_logprobs, expected[at.repeat(told.sizes), told.top_ids], atol=2e-3)


@pytest.mark.timeout(1500)
def test_what_the_temperature_does_was_tried_once_and_is_recorded(folder, captured):
    result, ctx = captured
    assert [fields["scale"] for event, fields in ctx.events.seen if event == "temperature_tried"] == ["raw"]
    facts = {"top_k": TOP_K, "tokenizers": {"tiny": tokenizer_digest(TEACHER)}, "scales": {"tiny": "raw"}}
    assert result.metrics["targets"] == {"rows": PROMPTS, **facts}


@pytest.mark.timeout(1500)
def test_a_run_from_stored_answers_starts_nothing_and_writes_the_same(folder, captured):
    again, ctx = run(folder, "again", config(TOP_K))
    assert ctx.events.seen == [] and list(ctx.workdir.glob("*.log")) == []
    assert (again.content, again.metrics) == (captured[0].content, captured[0].metrics)


@pytest.mark.timeout(1500)
def test_fewer_are_cut_from_the_stored_answers(folder, captured):
    fewer, ctx = run(folder, "fewer", config(5))
    assert ctx.events.seen == [] and fewer.content != captured[0].content
    for row_id, told in targets(folder, "fewer").items():
        assert set(told.sizes.tolist()) == {5}
        full = targets(folder)[row_id]
        assert told.top_logprobs.tolist() == full.top_logprobs.reshape(-1, TOP_K)[:, :5].ravel().tolist()


@pytest.mark.timeout(1500)
def test_sizes(folder, captured, record_property):
    """What a token costs; printed with `-s`."""
    tokens = sum(len(told) for told in targets(folder).values())
    side = sum(path.stat().st_size for path in (folder / "soft" / "targets").iterdir())
    stored = sum(path.stat().st_size for path in (folder / "data" / "responses" / "answers").iterdir())
    print(json.dumps({"tokens": tokens, "side_file_B_per_token": side / tokens, "stored_B_per_token": stored / tokens}))
    assert side / tokens < 4 * TOP_K * 2 + 64
