"""What tokens cost: the config's price, the dated table, or nobody knows; money in whole nano-dollars."""

from datetime import date
from pathlib import Path

import pytest

from pipeline.core.config_api import AnthropicTeacher, GeminiTeacher, OpenAITeacher
from pipeline.core.config_budget import TokenPrice, nano, usd
from pipeline.core.config_teacher import VllmTeacher
from pipeline.core.errors import UsageError
from pipeline.teacher.prices import FREE, Price, price_of, read_prices


def api(provider: str = "p", model: str = "m", **more: object) -> OpenAITeacher:
    given = {"kind": "openai", "base_url": "https://a.example/v1", "provider": provider, "model": model, **more}
    return OpenAITeacher.model_validate(given)


class TestMoney:
    @pytest.mark.parametrize(
        ("typed", "exact"), [(5, 5_000_000_000), (0.1, 100_000_000), (2.675, 2_675_000_000), (1e-9, 1), (0, 0)]
    )
    def test_what_a_person_types_is_counted_exactly(self, typed: float, exact: int) -> None:
        assert nano(typed) == exact

    @pytest.mark.parametrize(
        ("counted", "told"),
        [
            (0, "$0.00"),
            (12_300_000_000, "$12.30"),
            (1_234_567_890_000, "$1,234.57"),
            (123_456_789, "$0.12"),
            (1_234_567, "$0.0012"),
            (70, "$0.00000007"),
        ],
    )
    def test_a_sum_is_told_with_as_many_digits_as_it_needs(self, counted: int, told: str) -> None:
        assert usd(counted) == told

    def test_tokens_cost_whole_nano_dollars_never_too_few(self) -> None:
        price = Price.of(TokenPrice(input=2.5, output=10))
        assert price.cost(1_000_000, 0) == 2_500_000_000 and price.cost(3, 2) == 7_500 + 20_000
        assert Price.of(TokenPrice(input=0.0001, output=0)).cost(1, 0) == 1
        assert price.cost(0, 0) == 0


class TestWhoSaysIt:
    def test_the_config_before_the_table(self) -> None:
        assert price_of(api("openai", "gpt-4o-mini")) == Price(150_000_000, 600_000_000)
        given = {"input": 1, "output": 0.25}
        assert price_of(api("openai", "gpt-4o-mini", price=given)) == Price(1_000_000_000, 250_000_000)

    def test_the_table_knows_models_of_the_native_apis(self) -> None:
        claude = AnthropicTeacher.model_validate({"kind": "anthropic", "model": "claude-haiku-4-5"})
        gemini = GeminiTeacher.model_validate({"kind": "gemini", "model": "gemini-3.5-flash"})
        assert price_of(claude) == Price(1_000_000_000, 5_000_000_000)
        assert price_of(gemini) == Price(1_500_000_000, 9_000_000_000)

    def test_what_nobody_knows_is_unknown_and_not_free(self) -> None:
        assert price_of(api()) is None
        assert price_of(api("elsewhere", "gpt-4o-mini")) is None

    def test_a_server_of_our_own_costs_nothing_unless_the_config_says_so(self) -> None:
        local = {"kind": "vllm", "model": "./model"}
        assert price_of(VllmTeacher.model_validate(local)) == FREE
        priced = VllmTeacher.model_validate({**local, "price": {"input": 1, "output": 1}})
        assert price_of(priced) == Price(1_000_000_000, 1_000_000_000)


class TestTable:
    def test_each_entry_says_when_and_where_it_was_read(self) -> None:
        entries = read_prices()
        assert len(entries) >= 5, f"found {len(entries)} entries"
        for entry in entries:
            assert date(2026, 1, 1) <= entry.as_of and "https://" in entry.source
            assert 0 < entry.price.input < entry.price.output, "output costs more everywhere"
            assert entry.price.cached_input is None or entry.price.cached_input < entry.price.input

    ENTRY = "- {providers: [p], models: [m], price: {input: 1, output: 2}, as_of: 2026-01-02, source: 's'}\n"

    @pytest.mark.parametrize(
        ("text", "told"),
        [
            (ENTRY.replace("as_of: 2026-01-02, ", ""), "Field required"),
            (ENTRY.replace("input: 1", "input: -1"), "greater than or equal to 0"),
            (ENTRY.replace("source", "origin"), "not valid"),
            (ENTRY * 2, "lists p m twice"),
            ("prices: 5\n", "not valid"),
        ],
    )
    def test_what_is_no_table_is_refused_with_its_place(self, tmp_path: Path, text: str, told: str) -> None:
        path = tmp_path / "prices.yaml"
        path.write_text(text, "utf-8")
        with pytest.raises(UsageError, match=told) as caught:
            price_of(api(), path)
        assert caught.value.where.startswith(str(path))
