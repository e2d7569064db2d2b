"""A step's key moves if and only if a field that can change a row moves."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from pipeline.core.config import DedupStep, FilterStep, GenerateStep, TrainStep
from pipeline.core.config_base import OPERATIONAL, identity
from pipeline.core.lineage import step_key
from tests.support import POLICY

shares = st.floats(0, 0.99, allow_nan=False)
positive = st.integers(1, 10**6)
names = st.text("abcdefgh", min_size=1, max_size=8)
seconds = st.floats(0.001, 10**6, allow_nan=False)

SAMPLING = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.floats(0, 2),
        "top_p": st.floats(0.01, 1),
        "top_k": st.none() | positive,
        "stop": st.lists(st.text(max_size=3), max_size=3),
        "max_tokens": positive,
    },
)
TEACHER = st.fixed_dictionaries(
    {"kind": st.just("openai"), "provider": names, "model": names},
    optional={"license": names},
).map(lambda teacher: {"base_url": "https://a.example/v1", **teacher})
GENERATE = st.fixed_dictionaries(
    {
        "generate": st.fixed_dictionaries(
            {"teacher": st.just("t")},
            optional={"sampling": SAMPLING, "samples": positive, "draw": st.integers()},
        ),
        "teachers": st.fixed_dictionaries({"t": TEACHER}),
    }
)
TRAIN = st.fixed_dictionaries(
    {
        "train": st.fixed_dictionaries(
            {},
            optional={
                "epochs": st.floats(0.1, 9),
                "seed": st.integers(),
                "warmup_share": shares,
                "precision": st.sampled_from(["float32", "bfloat16"]),
                "tuning": st.sampled_from([{"kind": "full"}, {"kind": "lora", "r": 4}, {"kind": "lora"}]),
            },
        ),
        "student": st.fixed_dictionaries({"model": st.sampled_from(["./a", "./b"])}),
        "policy": st.just(POLICY),
    }
)
STEPS: st.SearchStrategy[tuple[type[BaseModel], dict[str, Any]]] = st.one_of(
    st.tuples(st.just(GenerateStep), GENERATE),
    st.tuples(st.just(TrainStep), TRAIN),
    st.tuples(
        st.just(FilterStep),
        st.fixed_dictionaries({"filter": st.fixed_dictionaries({}, optional={"min_chars": positive})}),
    ),
    st.tuples(
        st.just(DedupStep),
        st.fixed_dictionaries({"dedup": st.fixed_dictionaries({}, optional={"normalise": st.booleans()})}),
    ),
)


def key(step: BaseModel) -> str:
    return step_key({"stage": "x", "version": 1, "config": identity(step), "inputs": {}, "files": {}})


def counted(step: BaseModel) -> dict[str, Any]:
    """What counts, found without `identity`: the dumped fields, minus the marked ones."""
    left: dict[str, Any] = {}
    for name, field in type(step).model_fields.items():
        value = getattr(step, name)
        if OPERATIONAL in field.metadata:
            continue
        left[name] = counted(value) if isinstance(value, BaseModel) else value
    if isinstance(left.get("model"), str) and left["model"].startswith("./"):
        left["model"] = "a folder"
    return left


@given(STEPS, STEPS)
def test_keys_are_equal_exactly_when_what_counts_is_equal(
    one: tuple[type[BaseModel], dict[str, Any]], other: tuple[type[BaseModel], dict[str, Any]]
) -> None:
    first, second = (kind.model_validate(data) for kind, data in (one, other))
    assert (key(first) == key(second)) == (repr(counted(first)) == repr(counted(second)))


@given(GENERATE, positive, seconds, names)
def test_operational_fields_never_move_a_key(data: dict[str, Any], number: int, wait: float, host: str) -> None:
    moved = {
        "generate": {**data["generate"], "retry": {"budget_s": wait, "timeout_s": wait}},
        "teachers": {
            "t": {
                **data["teachers"]["t"],
                "base_url": f"https://{host}.example/v2",
                "concurrency": number,
                "api_key": "${env:SOME_KEY}",
            }
        },
    }
    assert key(GenerateStep.model_validate(moved)) == key(GenerateStep.model_validate(data))


@given(GENERATE, st.randoms(use_true_random=False))
def test_the_order_of_keys_in_the_file_never_moves_a_key(data: dict[str, Any], random: Any) -> None:
    def shuffled(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        items = [*value.items()]
        random.shuffle(items)
        return {name: shuffled(item) for name, item in items}

    assert key(GenerateStep.model_validate(shuffled(data))) == key(GenerateStep.model_validate(data))


@given(GENERATE, st.integers(-5, 5))
def test_another_draw_moves_the_key(data: dict[str, Any], draw: int) -> None:
    step = GenerateStep.model_validate(data)
    moved = step.model_copy(update={"generate": step.generate.model_copy(update={"draw": draw})})
    assert (key(moved) == key(step)) == (step.generate.draw == draw)
