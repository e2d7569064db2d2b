"""The form of answers: what a config may ask for, what each answer is held against, and how little time that takes."""

import json
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from pipeline.core.config_api import AnthropicTeacher, GeminiTeacher, OpenAITeacher
from pipeline.core.config_base import identity
from pipeline.core.config_refusals import generate_refusals, response_refusals
from pipeline.core.config_response import ResponseForm, form_files, form_that_counts, loaded_form, schema_problem
from pipeline.core.config_server import ServerTeacher
from pipeline.core.config_teacher import GenerateConfig, ReplayTeacher, Teacher, VllmTeacher
from pipeline.core.errors import UsageError
from pipeline.core.lineage import DigestCache
from pipeline.core.record import Message
from pipeline.teacher.request import Asked
from pipeline.text.structure import BAD_STRUCTURE, MAX_CHARS, MAX_DEPTH, Structure

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
FORMS: Any = TypeAdapter(ResponseForm)


def form(**given: Any) -> ResponseForm:
    return FORMS.validate_python(given)


def schema(value: Any) -> ResponseForm:
    return form(kind="json_schema", json_schema=value)


def problem(given: ResponseForm | None, text: str) -> str | None:
    return Structure.of(given).problem(text)


def refusal(**given: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        form(**given)
    return str(caught.value)


class TestChecks:
    @pytest.mark.parametrize("text", ['{"name": "A", "age": 3}', ' {"age":3.0,"name":""}\n'])
    def test_json_that_fits_passes(self, text: str) -> None:
        assert problem(schema(PERSON), text) is None

    @pytest.mark.parametrize(
        ("text", "why"),
        [
            ("", "not JSON"),
            ('```json\n{"name": "A", "age": 3}\n```', "not JSON"),
            ('{"name": "A", "age": 3} Done.', "not JSON"),
            ('{"name": "A", "age": NaN}', "not JSON"),
            ('{"name": "A"}', "breaks `required` at depth 0"),
            ('{"name": "A", "age": -1}', "breaks `minimum` at depth 1"),
            ('{"name": "A", "age": "3"}', "breaks `type` at depth 1"),
            ('{"name": "A", "age": 3, "x": 1}', "breaks `additionalProperties` at depth 0"),
            ("[]", "breaks `type` at depth 0"),
        ],
    )
    def test_json_that_does_not_fit_says_where_without_quoting_it(self, text: str, why: str) -> None:
        assert problem(schema(PERSON), text) == why

    def test_a_regular_expression_holds_from_beginning_to_end(self) -> None:
        digits = form(kind="regex", pattern="[0-9]{3}|x")
        assert [problem(digits, text) is None for text in ("123", "x", "1234", "123\n", " 123", "xx", "")] == [
            True, True, False, False, False, False, False,
        ]  # fmt: skip

    def test_a_choice_is_one_to_the_letter(self) -> None:
        choice = form(kind="choice", choices=["yes", "no"])
        assert [problem(choice, text) is None for text in ("yes", "no", "Yes", "yes ", "yesno")] == [
            True, True, False, False, False,
        ]  # fmt: skip

    def test_free_text_fits_whatever_it_says(self) -> None:
        assert problem(None, "x" * (MAX_CHARS + 1)) is None

    def test_references_inside_the_schema_are_followed(self) -> None:
        tree = {"$ref": "#/$defs/node", "$defs": {"node": {"type": "array", "items": {"$ref": "#/$defs/node"}}}}
        assert problem(schema(tree), "[[], [[]]]") is None
        assert problem(schema(tree), "[[], [1]]") == "breaks `type` at depth 2"

    def test_equal_items_are_found_as_json_schema_understands_equal(self) -> None:
        unique = schema({"uniqueItems": True})
        texts = ("[1, 2]", "[1, 1.0]", '[{"a": 1, "b": 2}, {"b": 2, "a": 1}]', "[1, true]", '["1", 1]')
        assert [problem(unique, text) is None for text in texts] == [True, False, False, True, True]

    def test_patterns_inside_a_schema_match_anywhere_as_json_schema_says(self) -> None:
        assert problem(schema({"type": "string", "pattern": "b+"}), '"abc"') is None
        assert problem(schema({"type": "string", "pattern": "^b+$"}), '"abc"') is not None

    @pytest.mark.parametrize(
        ("divisor", "fits", "differs"),
        [
            (0.01, ["19.99", "0.29", "4.35", "1.15", "3", "-0.3", "0"], ["0.005", "1.999"]),
            (0.1, ["1e308", "0.3", "123456789012345678901234567890"], ["0.25"]),
            (3, ["3.0", "123456789012345678901234567890"], ["1e308", "123456789012345678901234567891", "1.5"]),
            (10**400, ["0"], ["1.5", "7"]),
        ],
        ids=["0.01", "0.1", "3", "huge"],
    )
    def test_multiples_are_those_of_the_decimal_digits(self, divisor: Any, fits: list[str], differs: list[str]) -> None:
        multiples = schema({"type": "number", "multipleOf": divisor})
        assert [text for text in fits if problem(multiples, text) is not None] == []
        assert [text for text in differs if problem(multiples, text) is None] == []

    def test_every_price_is_a_multiple_of_a_cent(self) -> None:
        cents = schema({"items": {"multipleOf": 0.01}})
        assert problem(cents, json.dumps([float(f"{number / 100:.2f}") for number in range(5000)])) is None

    def test_integers_of_more_than_64_bits_are_equal_only_to_the_digit(self) -> None:
        unique = schema({"uniqueItems": True})
        big = "123456789012345678901234567890"
        assert problem(unique, f"[{big}, {big[:-1]}1]") is None
        assert problem(unique, f"[{big}, {big}]") is not None
        assert problem(unique, "[1e23, 100000000000000000000000]") is not None

    @pytest.mark.parametrize("name", ["x%y", "a/b", "ä", "~1"])
    def test_references_are_read_as_parts_of_urls(self, name: str) -> None:
        reference = "#/$defs/" + quote(name.replace("~", "~0").replace("/", "~1"), safe="~")
        referring = schema({"properties": {"a": {"$ref": reference}}, "$defs": {name: {"type": "string"}}})
        assert problem(referring, '{"a": "b"}') is None and problem(referring, '{"a": 1}') is not None

    def test_references_lead_to_where_json_schema_knows_no_schemas(self) -> None:
        code = {"$ref": "#/components/schemas/Code"}
        own = schema({"properties": {"code": code}, "components": {"schemas": {"Code": {"type": "string"}}}})
        assert problem(own, '{"code": "a"}') is None and problem(own, '{"code": 1}') is not None

    def test_an_id_of_the_schema_leads_no_reference_away(self) -> None:
        for name in ("https://a.example/s.json", "http://[", "urn:x"):
            with_id = schema(
                {"$id": name, "properties": {"a": {"$ref": "#/$defs/x"}}, "$defs": {"x": {"type": "null"}}}
            )
            assert problem(with_id, '{"a": null}') is None and problem(with_id, '{"a": 1}') is not None


PLACES = ["#", "#/$defs/a", "#/$defs/b", "#/odd/x", "#/odd", "#/properties/a", "#/anyOf/0", "#/gone", "o.json", "#b"]
LEAVES = st.sampled_from(
    [
        *({"type": "string"}, {"type": "objekt"}, {"multipleOf": 0.01}, {"multipleOf": 10**400}, {"minimum": 10**400}),
        *({"uniqueItems": True}, {"pattern": "a"}, {"pattern": "(?=a)"}, {"pattern": "\\z"}, {"enum": [1, {"a": []}]}),
        *({"unevaluatedProperties": False}, {"unevaluatedItems": False}, {"$id": "http://["}, True, False, {}, 3),
        *({"minContains": 2, "contains": {}}, {"required": ["a"]}, {"const": 1e300}, {"type": ["integer", "array"]}),
        *({"patternProperties": {"(": {}}}, {"dependentRequired": {"a": ["b"]}}, {"$schema": "http://x"}),
        *({"$ref": place} for place in PLACES),
    ]
)
SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: (
        st.dictionaries(
            st.sampled_from(["items", "not", "if", "then", "additionalProperties", "propertyNames", "contains"]), inner
        )
        | st.dictionaries(st.sampled_from(["anyOf", "allOf", "oneOf", "prefixItems"]), st.lists(inner, max_size=2))
        | st.dictionaries(
            st.sampled_from(["properties", "$defs", "odd", "dependentSchemas"]),
            st.dictionaries(st.sampled_from(["a", "b", "x"]), inner),
        )
    ),
    max_leaves=6,
)
OBJECTS = st.builds(
    lambda parts: {key: value for part in parts for key, value in part.items()},
    st.lists(
        st.fixed_dictionaries(
            {},
            optional={
                "properties": st.dictionaries(st.sampled_from("ab"), SCHEMAS),
                "$defs": st.dictionaries(st.sampled_from("ab"), SCHEMAS),
                "odd": st.dictionaries(st.just("x"), SCHEMAS),
                "anyOf": st.lists(SCHEMAS, min_size=1, max_size=2),
                "$ref": st.sampled_from(PLACES),
                "items": SCHEMAS,
            },
        ),
        max_size=2,
    ),
)
NUMBERS = st.integers(-(10**30), 10**30) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.sampled_from(["", "a", "b"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ab"), inner),
    max_leaves=6,
)


@given(OBJECTS, st.lists(VALUES, max_size=4))
def test_a_schema_is_refused_when_the_config_is_read_or_judges_every_text(given_schema: Any, values: Any) -> None:
    if schema_problem(given_schema) is not None:
        return
    structure = Structure.of(schema(given_schema))
    for value in values:
        said = structure.problem(json.dumps(value))
        assert said is None or said.startswith("breaks "), "no text of a few levels is too deep"


class TestReason:
    def test_what_does_not_fit_leaves_as_bad_structure(self) -> None:
        assert Structure.of(schema(PERSON)).reason("no", "stop") == BAD_STRUCTURE
        assert Structure.of(schema(PERSON)).reason('{"name": "A", "age": 3}', "stop") is None

    def test_what_was_cut_is_left_to_the_policy_on_cut_answers(self) -> None:
        assert Structure.of(schema(PERSON)).reason('{"name": "A', "length") is None

    def test_tool_calls_alone_are_no_text_to_judge(self) -> None:
        structure = Structure.of(schema(PERSON))
        assert structure.reason("", "tool_calls", has_calls=True) is None
        assert structure.reason("and", "tool_calls", has_calls=True) == BAD_STRUCTURE
        assert structure.reason("", "stop") == BAD_STRUCTURE


@pytest.mark.timeout(60)
class TestTime:
    """Each of these takes minutes to ages where the defence is missing, and well under a second with it."""

    def test_a_pattern_that_backtracks_is_linear_here(self) -> None:
        evil, text = "(a+)+b", "a" * 20_000
        assert problem(form(kind="regex", pattern=evil), text) is not None
        assert problem(schema({"pattern": f"^{evil}$"}), json.dumps(text)) is not None

    def test_many_objects_are_compared_by_their_digests(self) -> None:
        items = json.dumps([{"a": number} for number in range(40_000)])
        assert problem(schema({"uniqueItems": True}), items) is None

    def test_deep_nesting_is_refused_before_any_recursion(self) -> None:
        tree = schema({"$ref": "#/$defs/n", "$defs": {"n": {"items": {"$ref": "#/$defs/n"}}}})
        assert problem(tree, "[" * MAX_DEPTH + "]" * MAX_DEPTH) is None
        assert problem(tree, "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1)) == f"nested deeper than {MAX_DEPTH} levels"
        assert problem(tree, "[" * 900 + "]" * 900) == f"nested deeper than {MAX_DEPTH} levels"
        assert problem(tree, "[" * 500_000) is not None

    def test_what_is_too_long_is_not_read(self) -> None:
        assert problem(form(kind="regex", pattern="a*"), "a" * (MAX_CHARS + 1)) == "longer than 1,000,000 characters"


def elsewhere(target: Any) -> Any:
    """A schema that refers to a place where JSON Schema knows no schemas."""
    code = {"$ref": "#/components/schemas/Code"}
    return {"type": "object", "properties": {"code": code}, "components": {"schemas": {"Code": target}}}


CIRCLES: list[Any] = [
    {"properties": {"a": {"$ref": "#/$defs/x"}}, "$defs": {"x": {"$ref": "#/$defs/x"}}},
    {"properties": {"a": {"$ref": "#/$defs/x"}}, "$defs": {"x": {"allOf": [{"not": {"$ref": "#/$defs/x"}}]}}},
    {"items": {"anyOf": [{"type": "null"}, {"$ref": "#/items"}]}},
    {"$defs": {"x": {"if": {"$ref": "#/$defs/y"}}, "y": {"then": {"oneOf": [{"$ref": "#/$defs/x"}]}}}},
    {"items": {"dependentSchemas": {"a": {"$ref": "#/items"}}}},
    elsewhere({"else": {"$ref": "#/components/schemas/Code"}}),
]
ODD_TARGETS: list[tuple[Any, str]] = [
    ({"type": "string", "pattern": "^(?=.*[0-9]).+$"}, "RE2"),
    ({"type": "str"}, "no JSON Schema of draft 2020-12"),
    ({"$ref": "#/components/schemas/Gone"}, "leads to nothing"),
    ({"$ref": "https://example.com/x.json"}, "leads to nothing"),
    ({"items": {"$ref": "http://127.0.0.1:1/x.json"}}, "leads to nothing"),
    ({"$dynamicRef": "#x"}, "`$dynamicRef` is not taken"),
    (["no", "schema"], "leads to nothing"),
]


class TestConfig:
    @pytest.mark.parametrize(
        ("given", "why"),
        [
            ({"kind": "json_schema"}, "give `json_schema` or `path`"),
            ({"kind": "json_schema", "json_schema": {}, "path": "s.json"}, "one of the two"),
            ({"kind": "json_schema", "json_schema": {"type": "objekt"}}, "no JSON Schema of draft 2020-12"),
            ({"kind": "json_schema", "json_schema": {"$schema": "http://json-schema.org/draft-07/schema#"}}, "$schema"),
            ({"kind": "json_schema", "json_schema": {"$ref": "https://a.example/s.json"}}, "leads to nothing"),
            ({"kind": "json_schema", "json_schema": {"$ref": "#/$defs/x"}}, "leads to nothing"),
            (
                {"kind": "json_schema", "json_schema": {"$ref": "o.json#/$defs/x", "$defs": {"x": {}}}},
                "leads to nothing",
            ),
            ({"kind": "json_schema", "json_schema": {"$ref": "#"}}, "refers to itself without end"),
            *(({"kind": "json_schema", "json_schema": given}, "refers to itself without end") for given in CIRCLES),
            *(({"kind": "json_schema", "json_schema": elsewhere(given)}, why) for given, why in ODD_TARGETS),
            ({"kind": "json_schema", "json_schema": {"properties": {1: {}}}}, "what JSON cannot"),
            ({"kind": "json_schema", "json_schema": {"contentSchema": {"$id": "x"}}}, "an `$id` of its own"),
            ({"kind": "json_schema", "json_schema": {"items": {"patternProperties": {}}}}, "`patternProperties`"),
            ({"kind": "json_schema", "json_schema": {"properties": {"a": {"pattern": "(?=x)"}}}}, "RE2"),
            ({"kind": "json_schema", "json_schema": {"not": {"$id": "x"}}}, "an `$id` of its own"),
            ({"kind": "json_schema", "json_schema": {}, "name": "a b"}, "name"),
            ({"kind": "regex", "pattern": "("}, "RE2"),
            ({"kind": "regex", "pattern": "a)|(b"}, "RE2"),
            ({"kind": "regex", "pattern": r"(a)\1"}, "RE2"),
            ({"kind": "choice", "choices": []}, "choices"),
            ({"kind": "choice", "choices": ["a", "a"]}, "given twice"),
        ],
    )
    def test_what_cannot_be_checked_is_refused_when_the_config_is_read(self, given: Any, why: str) -> None:
        assert why in refusal(**given)

    def test_a_property_may_have_the_name_of_a_refused_keyword(self) -> None:
        schema({"properties": {"patternProperties": {"type": "string"}, "$ref": {}}})

    def test_a_file_is_the_same_as_its_content_in_the_config(self, tmp_path: Path) -> None:
        path = tmp_path / "s.json"
        path.write_text(json.dumps(PERSON, indent=2))
        given = form(kind="json_schema", path=path)
        assert form_files(given) == {"generate.response.path": path} and form_files(schema(PERSON)) == {}
        assert loaded_form(given) == schema(PERSON)

    @pytest.mark.parametrize("content", ["", "[]", '{"type": "objekt"}', "{" * 5000, '{"x": "\\'])
    def test_a_file_without_a_schema_is_a_usage_error_in_three_lines(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "s.json").write_text(content)
        with pytest.raises(UsageError) as caught:
            loaded_form(form(kind="json_schema", path=tmp_path / "s.json"))
        assert len(str(caught.value).splitlines()) == 3 and "s.json" in str(caught.value)

    def test_a_missing_file_is_a_usage_error(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="No such file"):
            loaded_form(form(kind="json_schema", path=tmp_path / "none.json"))


class TestKeys:
    def counted(self, given: ResponseForm | None) -> str:
        """The key of one request for answers of a form."""
        teacher = OpenAITeacher(kind="openai", base_url="https://a.example/v1", provider="p", model="m")
        config = GenerateConfig(teacher="t", response=given)
        asked = Asked.of(teacher, config.sampling, 0, DigestCache(Path("unused"))).under(given, "auto")
        return asked.request("s", "p", 0, [Message("user", "Hi")]).key

    def test_without_a_form_nothing_counts(self) -> None:
        assert form_that_counts(None) == {}
        assert "response" not in identity(GenerateConfig(teacher="t"))

    def test_every_part_of_a_form_counts_and_so_does_the_order_of_properties(self, tmp_path: Path) -> None:
        backwards = {**PERSON, "properties": dict(reversed([*PERSON["properties"].items()]))}  # type: ignore[attr-defined]
        path = tmp_path / "s.json"
        path.write_text(json.dumps({"type": "object"}))
        forms = [
            None,
            schema(PERSON),
            schema(backwards),
            form(kind="json_schema", json_schema=PERSON, strict=False),
            form(kind="json_schema", json_schema=PERSON, name="other"),
            form(kind="json_schema", path=path),
            form(kind="regex", pattern="a"),
            form(kind="regex", pattern="b"),
            form(kind="choice", choices=["a"]),
            form(kind="choice", choices=["b"]),
        ]
        assert len({self.counted(each) for each in forms}) == len(forms)

    def test_a_file_counts_by_its_content_and_not_by_its_layout_or_place(self, tmp_path: Path) -> None:
        for name, indent in (("a.json", None), ("b.json", 4)):
            (tmp_path / name).write_text(json.dumps(PERSON, indent=indent))
        keys = {self.counted(form(kind="json_schema", path=tmp_path / name)) for name in ("a.json", "b.json")}
        assert keys == {self.counted(schema(PERSON))}

    def test_the_policy_on_seeds_is_in_no_key(self) -> None:
        teacher = OpenAITeacher(kind="openai", base_url="https://a.example/v1", provider="p", model="m")
        asked = Asked.of(teacher, GenerateConfig(teacher="t").sampling, 0, DigestCache(Path("unused")))
        keys = {
            asked.under(None, seeds).request("s", "p", 0, [Message("user", "Hi")]).key for seeds in ("auto", "never")
        }
        assert len(keys) == 1


TEACHERS: dict[str, Teacher] = {
    "vllm": VllmTeacher(kind="vllm", model="./m"),
    "server": ServerTeacher(kind="server", model="./m", command=("serve", "{port}")),
    "vllm-like server": ServerTeacher(
        kind="server", model="./m", command=("serve", "{port}"), structured_outputs="vllm"
    ),
    "openai": OpenAITeacher(kind="openai", base_url="https://a.example/v1", provider="p", model="m"),
    "openai at vllm": OpenAITeacher(
        kind="openai", base_url="https://a.example/v1", provider="p", model="m", structured_outputs="vllm"
    ),
    "anthropic": AnthropicTeacher(kind="anthropic", model="m"),
    "gemini": GeminiTeacher(kind="gemini", model="m"),
    "replay": ReplayTeacher(kind="replay", path="rows.jsonl", origin="people"),
}
ALL = {"json_schema", "regex", "choice"}
KNOWN = {
    "vllm": ALL,
    "server": {"json_schema"},
    "vllm-like server": ALL,
    "openai": {"json_schema"},
    "openai at vllm": ALL,
    "anthropic": {"json_schema"},
    "gemini": {"json_schema", "choice"},
    "replay": ALL,
}


class TestRefusals:
    @pytest.mark.parametrize("name", TEACHERS)
    def test_each_kind_takes_the_forms_that_its_api_knows(self, name: str) -> None:
        forms = [schema(PERSON), form(kind="regex", pattern="a"), form(kind="choice", choices=["a"])]
        refusals = {each.kind: [*response_refusals(TEACHERS[name], each)] for each in forms}
        assert {kind for kind, found in refusals.items() if not found} == KNOWN[name]
        assert all(f"kind {kind}" in text for kind, found in refusals.items() for text in found)

    @pytest.mark.parametrize("name", TEACHERS)
    def test_several_samples_at_temperature_0_are_refused_but_of_a_file(self, name: str) -> None:
        def refused(temperature: float | None, samples: int) -> bool:
            given = {"teacher": "t", "samples": samples, "sampling": {"temperature": temperature}}
            return any(
                "samples" in text for text in generate_refusals(TEACHERS[name], GenerateConfig.model_validate(given))
            )

        assert refused(0, 2) == (name != "replay")
        assert not refused(0, 1) and not refused(0.1, 2) and not refused(None, 2)

    def test_what_must_have_a_form_is_not_continued(self) -> None:
        given = {"teacher": "t", "response": {"kind": "choice", "choices": ["a"]}, "on_length": {"kind": "continue"}}
        (refused,) = generate_refusals(TEACHERS["vllm"], GenerateConfig.model_validate(given))
        assert "cannot be continued" in refused
