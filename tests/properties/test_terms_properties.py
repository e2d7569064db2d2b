"""The algebra of terms: a join is a union, and nothing that is added ever loosens a verdict."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from pipeline.core.config_policy import PolicyConfig
from pipeline.terms.bind import bind
from pipeline.terms.grants import Grant, Held, join, join_all, join_scalars, value_text
from pipeline.terms.policy import judge
from pipeline.terms.records import Registry, TermRecord
from pipeline.terms.statement import RowSet, Source, Statement
from pipeline.terms.verdict import OUTCOMES, Verdict
from tests.examples import examples
from tests.terms_cases import TODAY, a_record, a_registry

RESTRICTIONS: tuple[Any, ...] = (
    "no_train.any",
    ("no_train.competing", "openai"),
    ("no_train.competing", "google"),
    ("no_train.other_family", "llama"),
    ("no_train.other_family", "qwen"),
    "no_train.general_purpose",
    ("needs_permission", "anthropic"),
    "noncommercial",
    "research_only",
    "no_derivatives",
    "no_redistribute_dataset",
    "internal_only",
    ("territory_exclude", ["EU", "KR"]),
    ("territory_exclude", ["US"]),
    ("mau_cap", 700),
    ("mau_cap", 100),
    ("revenue_cap", 10),
    ("use_policy", "https://x"),
    "unknown",
)
TRIGGERS = (
    "train_on_outputs",
    "distribute_dataset",
    "distribute_model_trained_on_outputs",
    "distribute_weights_copies",
    "distribute_licensed_material_or_derivative",
    "serve_product",
)
DUTIES: tuple[tuple[str, Any], ...] = (
    ("share_alike", "CC-BY-SA-3.0"),
    ("share_alike", "CC-BY-SA-4.0"),
    ("share_alike", "CDLA-Sharing"),
    ("name_prefix", "Llama"),
    ("name_prefix", "Llama 3"),
    ("name_prefix", "Qwen"),
    ("license_copy", None),
)
IDS = ("A", "B", "C", "CC-BY-SA-4.0", "CC-BY-SA-3.0", "CC-BY-NC-4.0")
LICENSES = (*IDS, "never heard of", "A OR B", "(A AND C) OR CC-BY-SA-4.0", "unknown")
ROLES = ("teacher", "prompt", "student_base", "judge", "system_prompt", "embedder")

some_restrictions = st.lists(st.sampled_from(RESTRICTIONS), max_size=3, unique_by=str)
some_duties = st.lists(
    st.tuples(st.sampled_from(DUTIES), st.sampled_from(TRIGGERS)).map(lambda pair: (*pair[0], pair[1])), max_size=2
)
confidences = st.sampled_from(["verified", "verified", "mirrored", "inferred", "unverified"])
kinds = st.sampled_from(["model_license", "data_license", "api_terms"])


@st.composite
def registries(draw: st.DrawFn) -> Registry:
    return a_registry(*(draw(records(name)) for name in IDS))


def records(name: str) -> st.SearchStrategy[TermRecord]:
    def build(restrictions: Any, duties: Any, confidence: str, kind: str) -> TermRecord:
        return a_record(name, *restrictions, owes=tuple(duties), confidence=confidence, kind=kind)

    return st.builds(build, some_restrictions, some_duties, confidences, kinds)


sources = st.builds(
    Source,
    role=st.sampled_from(ROLES),
    name=st.sampled_from(["a", "b", "c"]),
    what=st.just("x"),
    licenses=st.lists(st.sampled_from(LICENSES), max_size=2).map(tuple),
    family=st.sampled_from(["llama", "qwen", None]),
)
row_sets = st.builds(
    RowSet,
    rows=st.integers(1, 99),
    teacher=st.sampled_from(["a", "b", "c"]),
    prompt_sets=st.sets(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=2).map(lambda each: tuple(sorted(each))),
    licenses=st.lists(st.sampled_from(IDS), max_size=2).map(tuple),
)
scopes = st.sampled_from(["none", "internal", "public"])
policies = st.builds(
    lambda use, dataset, model, unknown, territory, competes: PolicyConfig.model_validate(
        {
            "intended_use": use,
            "release": {"dataset": dataset, "model": model},
            "allow_unknown": unknown,
            "territory": territory,
            "org": {"mau": 500},
            "competes_with": {"openai": competes},
        }
    ),
    st.sampled_from(["commercial", "research"]),
    scopes,
    scopes,
    st.booleans(),
    st.sampled_from([[], ["DE"], ["US"]]),
    st.sampled_from(["yes", "no", "undetermined"]),
)


def held(atom: Any, role: Any, record: str) -> Held:
    name, value = atom if isinstance(atom, tuple) else (atom, None)
    return Held(name, value_text(value), None, role, "a", record, "model_license")


grants = st.builds(
    lambda members, names: Grant(frozenset(members), frozenset(names)),
    st.lists(st.builds(held, st.sampled_from(RESTRICTIONS), st.sampled_from(ROLES), st.sampled_from(IDS)), max_size=5),
    st.sets(st.sampled_from(IDS), max_size=3),
)


def verdict(statement: Statement, policy: PolicyConfig, registry: Registry) -> Verdict:
    return judge(statement, policy, registry, gate="dataset", today=TODAY)


def strictness(one: Verdict) -> int:
    return OUTCOMES.index(one.outcome)


def with_base(given: list[Source]) -> tuple[Source, ...]:
    """The first student is what the others are judged by, so there is one."""
    named = {(each.role, each.name): each for each in [Source("student_base", "base", "x", (), "llama"), *given]}
    return tuple(named.values())


some_sources = st.lists(sources, max_size=4).map(with_base)


class TestJoin:
    @examples(60)
    @given(grants, grants)
    def test_the_order_of_two_does_not_count(self, one: Grant, other: Grant) -> None:
        assert join(one, other) == join(other, one)

    @examples(60)
    @given(grants, grants, grants)
    def test_grouping_does_not_count(self, one: Grant, other: Grant, third: Grant) -> None:
        assert join(join(one, other), third) == join(one, join(other, third))

    @examples(30)
    @given(grants)
    def test_the_same_twice_is_the_same_and_nothing_is_its_unit(self, one: Grant) -> None:
        assert join(one, one) == one == join(one, Grant())

    @examples(60)
    @given(grants, grants)
    def test_limits_join_to_the_stricter_one(self, one: Grant, other: Grant) -> None:
        joined = join(one, other)
        assert joined.scalars == join_scalars(one.scalars, other.scalars)
        assert one.restrictions | other.restrictions == joined.restrictions


class TestNothingLoosens:
    @examples(70)
    @given(some_sources, sources, policies, registries())
    def test_a_source_more(
        self, given_: tuple[Source, ...], more: Source, policy: PolicyConfig, registry: Registry
    ) -> None:
        if (more.role, more.name) not in {(each.role, each.name) for each in given_}:
            before = verdict(Statement(given_), policy, registry)
            assert strictness(verdict(Statement((*given_, more)), policy, registry)) >= strictness(before)

    @examples(60)
    @given(some_sources, st.sampled_from(LICENSES), st.integers(0, 4), policies, registries())
    def test_a_licence_more(
        self, given_: tuple[Source, ...], name: str, at: int, policy: PolicyConfig, registry: Registry
    ) -> None:
        chosen = given_[at % len(given_)]
        own = chosen.licenses or ("unknown",)
        more = Source(chosen.role, chosen.name, chosen.what, (*own, name), chosen.family)
        changed = tuple(more if each is chosen else each for each in given_)
        before = verdict(Statement(given_), policy, registry)
        assert strictness(verdict(Statement(changed), policy, registry)) >= strictness(before)

    @examples(60)
    @given(some_sources, st.sampled_from(RESTRICTIONS), st.sampled_from(IDS), policies, registries())
    def test_an_atom_more_in_a_record(
        self, given_: tuple[Source, ...], atom: Any, name: str, policy: PolicyConfig, registry: Registry
    ) -> None:
        plain = tuple(
            Source(each.role, each.name, each.what, tuple(n for n in each.licenses if " OR " not in n), each.family)
            for each in given_
        )  # a licence that lets one choose is left for the other, when it gets stricter
        more = a_record(name, atom).restrictions
        record = registry.records[name]
        stricter = record.model_copy(update={"restrictions": (*record.restrictions, *more)})
        changed = a_registry(*({**registry.records, name: stricter}.values()))
        before = verdict(Statement(plain), policy, registry)
        assert strictness(verdict(Statement(plain), policy, changed)) >= strictness(before)

    @examples(70)
    @given(some_sources, st.lists(row_sets, min_size=1, max_size=3), row_sets, policies, registries())
    def test_rows_more(
        self, given_: tuple[Source, ...], rows: list[RowSet], more: RowSet, policy: PolicyConfig, registry: Registry
    ) -> None:
        before = verdict(Statement(given_, tuple(rows)), policy, registry)
        after = verdict(Statement(given_, (*rows, more)), policy, registry)
        assert strictness(after) >= strictness(before)


class TestShards:
    @examples(70)
    @given(some_sources, st.lists(row_sets, min_size=2, max_size=4), policies, registries())
    def test_the_grants_of_shards_join_to_the_grant_of_the_whole_and_so_does_the_verdict(
        self, given_: tuple[Source, ...], rows: list[RowSet], policy: PolicyConfig, registry: Registry
    ) -> None:
        whole = Statement(given_, tuple(rows))
        shards = [Statement(given_, (each,)) for each in rows]
        assert join_all(bind(each, policy, registry).grant for each in shards) == bind(whole, policy, registry).grant
        verdicts = [verdict(each, policy, registry) for each in shards]
        together = verdict(whole, policy, registry)
        refusals = {(each.rule, each.atom, each.value) for each in together.refusals}
        apart = {(each.rule, each.atom, each.value) for one in verdicts for each in one.refusals}
        across = {name for name in refusals - apart if not name[1].startswith("conflict.")}
        assert across == set()  # only a conflict lies between shards, and it refuses
        if not refusals - apart:
            assert strictness(together) == max(map(strictness, verdicts))

    @examples(30)
    @given(some_sources, st.lists(row_sets, min_size=2, max_size=4), policies, registries(), st.randoms())
    def test_the_order_of_sources_and_rows_does_not_count(
        self, given_: tuple[Source, ...], rows: list[RowSet], policy: PolicyConfig, registry: Registry, random: Any
    ) -> None:
        mixed_sources, mixed_rows = [*given_], [*rows]
        random.shuffle(mixed_sources)
        random.shuffle(mixed_rows)
        before = verdict(Statement(given_, tuple(rows)), policy, registry)
        after = verdict(Statement(tuple(mixed_sources), tuple(mixed_rows)), policy, registry)
        assert before.outcome == after.outcome
        assert before.findings == after.findings
        assert before.obligations == after.obligations
