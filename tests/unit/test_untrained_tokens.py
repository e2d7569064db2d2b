"""Which tokens of a chat template a base never learned, and which tokens a list of texts means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.core.config_train import LoraTuning
from pipeline.core.errors import UsageError
from pipeline.student.tokenise import load_tokenizer
from pipeline.student.untrained import template_tokens, tokens_to_train, untrained_tokens
from tests.tiny_models import SPECIAL, make_tiny_model

PAD, BOS, STOP, SYSTEM, USER, ASSISTANT = range(len(SPECIAL))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return load_tokenizer(str(folder), None)


def load(folder: Path, *, tied: bool = True) -> Any:
    """A model whose rows all have the usual norm; an untied output layer gets rows of its own."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if not tied:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().flip(0).clone())
        model.config.tie_word_embeddings = False
    return model


class TestTokensOfATemplate:
    def test_those_of_all_roles_and_the_stop(self, tokenizer: Any) -> None:
        assert template_tokens(tokenizer, (STOP,)) == (BOS, STOP, SYSTEM, USER, ASSISTANT)

    def test_a_stop_that_the_template_does_not_write(self, tokenizer: Any) -> None:
        assert PAD in template_tokens(tokenizer, (STOP, PAD))

    def test_a_template_that_takes_no_system_message(self, folder: Path) -> None:
        tokenizer = load_tokenizer(str(folder), None)
        refuse = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
        tokenizer.chat_template = refuse + tokenizer.chat_template
        assert template_tokens(tokenizer, (STOP,)) == (BOS, STOP, USER, ASSISTANT)

    def test_tokens_that_only_reasoning_brings(self, folder: Path) -> None:
        tokenizer = load_tokenizer(str(folder), None)
        tokenizer.add_tokens(["<think>"])  # added, not special: as Qwen3 has it
        thinking = "{% if messages[-1].reasoning_content is defined %}<think>{% endif %}"
        tokenizer.chat_template += thinking
        assert tokenizer.convert_tokens_to_ids("<think>") in template_tokens(tokenizer, (STOP,))

    def test_words_are_none_of_them(self, tokenizer: Any) -> None:
        hello = tokenizer("Hello")["input_ids"]
        assert not set(hello) & set(template_tokens(tokenizer, (STOP,)))


class TestUntrainedRows:
    CANDIDATES = (BOS, STOP, SYSTEM, USER, ASSISTANT)

    def found(self, folder: Path, tokenizer: Any, change: Any, *, tied: bool = True) -> list[int]:
        import torch

        model = load(folder, tied=tied)
        with torch.no_grad():
            change(model)
        return untrained_tokens(model, tokenizer, self.CANDIDATES)

    def test_a_model_whose_rows_differ_and_have_equal_norms_has_none(self, folder: Path, tokenizer: Any) -> None:
        assert self.found(folder, tokenizer, lambda model: None) == []
        assert self.found(folder, tokenizer, lambda model: None, tied=False) == []

    def test_a_row_of_zeros(self, folder: Path, tokenizer: Any) -> None:
        assert self.found(folder, tokenizer, lambda model: model.model.embed_tokens.weight[USER].zero_()) == [USER]

    @pytest.mark.parametrize(("share", "expected"), [(0.29, [STOP]), (0.31, [])])
    def test_a_row_that_is_shorter_than_three_tenths_of_the_median(
        self, folder: Path, tokenizer: Any, share: float, expected: list[int]
    ) -> None:
        def shorten(model: Any) -> None:
            rows = model.model.embed_tokens.weight
            rows[STOP] *= share * rows.norm(dim=1).median() / rows[STOP].norm()

        assert self.found(folder, tokenizer, shorten) == expected

    def test_a_row_that_equals_another(self, folder: Path, tokenizer: Any) -> None:
        def fill(model: Any) -> None:
            rows = model.model.embed_tokens.weight
            rows[STOP] = rows[200]
            rows[USER] = rows[SYSTEM] = rows.mean(dim=0) * 100
            rows[ASSISTANT, :60] = rows[201, :60]  # equal in the first numbers only

        assert self.found(folder, tokenizer, fill) == [STOP, SYSTEM, USER]

    def test_padding_rows_do_not_move_the_median(self, folder: Path, tokenizer: Any) -> None:
        import torch

        def pad(model: Any) -> None:
            model.resize_token_embeddings(1200, mean_resizing=False)
            rows = model.get_input_embeddings().weight
            rows[300:] = 1e-4 * torch.randn(900, 64)
            rows[STOP] *= 0.01

        assert self.found(folder, tokenizer, pad) == [STOP]

    def test_an_untied_output_layer_counts_too(self, folder: Path, tokenizer: Any) -> None:
        def spoil(model: Any) -> None:
            model.lm_head.weight[STOP].zero_()
            model.model.embed_tokens.weight[USER].zero_()

        assert self.found(folder, tokenizer, spoil, tied=False) == [STOP, USER]


class TestTheList:
    def tokens(self, folder: Path, tokenizer: Any, *texts: str, **changes: Any) -> tuple[int, ...]:
        tuning = LoraTuning(kind="lora", train_tokens=texts, **changes)
        return tokens_to_train(load(folder), tokenizer, (STOP,), tuning)

    def test_texts_of_single_tokens(self, folder: Path, tokenizer: Any) -> None:
        assert self.tokens(folder, tokenizer, "<|user|>", "</s>", "<|user|>") == (STOP, USER)
        assert self.tokens(folder, tokenizer) == ()

    def test_a_text_that_is_several_tokens(self, folder: Path, tokenizer: Any) -> None:
        with pytest.raises(UsageError, match=r"'<\|tool\|>' is \d+ tokens of the student's tokenizer, not one"):
            self.tokens(folder, tokenizer, "</s>", "<|tool|>")

    def test_a_token_that_the_model_has_no_row_for(self, folder: Path) -> None:
        tokenizer = load_tokenizer(str(folder), None)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
        with pytest.raises(UsageError, match=r"300 embeddings and none for '<\|tool\|>', token 300"):
            self.tokens(folder, tokenizer, "<|tool|>")

    def test_embeddings_that_are_trained_anyway_leave_nothing_to_do(self, folder: Path, tokenizer: Any) -> None:
        assert self.tokens(folder, tokenizer, "</s>", modules_to_save=("embed_tokens",)) == ()
        assert self.tokens(folder, tokenizer, "</s>", modules_to_save=("lm_head",)) == (), "it is the same weight"
