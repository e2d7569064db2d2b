"""Some layers of a larger model become a model folder of their own, byte by byte."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest

from pipeline.core.errors import UsageError
from pipeline.student.layers import write_layers
from pipeline.student.weights import read_header, weight_files
from tests.tiny_models import make_tiny_model

LAYERS = 5


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_larger(tmp_path_factory.mktemp("larger"))


def make_larger(folder: Path, **saving: Any) -> Path:
    """A model of five layers with the tiny model's tokenizer, stored in bfloat16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    make_tiny_model(folder)
    config = LlamaConfig.from_pretrained(folder)
    config.num_hidden_layers = LAYERS
    torch.manual_seed(1)
    (folder / "model.safetensors").unlink()
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, **saving)
    return folder


def stored(folder: Path) -> dict[str, bytes]:
    """The bytes of every tensor of a model's folder."""
    found = {}
    for file in weight_files(folder):
        data = file.read_bytes()
        found |= {name: data[one.start : one.start + one.bytes] for name, one in read_header(file).items()}
    return found


def with_config(source: Path, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a model's folder with another config."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def check_layers(source: Path, out: Path, kept: tuple[int, ...]) -> None:
    before, after = stored(source), stored(out)
    renamed = {
        name.replace(f".layers.{old}.", f".layers.{new}."): before[name]
        for name in before
        for new, old in enumerate(kept)
        if f".layers.{old}." in name
    }
    others = {name: data for name, data in before.items() if ".layers." not in name}
    assert after == renamed | others


class TestTheFolder:
    def test_holds_the_bytes_of_the_chosen_layers_and_of_all_that_is_no_layer(
        self, larger: Path, tmp_path: Path
    ) -> None:
        write_layers(larger, (0, 2, 4), tmp_path / "base")
        check_layers(larger, tmp_path / "base", (0, 2, 4))

    def test_is_a_plain_model_with_its_tokenizer_and_template(self, larger: Path, tmp_path: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        write_layers(larger, (1, 3), tmp_path / "base")
        model, found = AutoModelForCausalLM.from_pretrained(tmp_path / "base", output_loading_info=True)
        assert model.config.num_hidden_layers == len(model.model.layers) == 2
        assert not any(found.values()), "nothing is missing and nothing is left over"
        assert model.model.layers[1].mlp.up_proj.weight.equal(
            AutoModelForCausalLM.from_pretrained(larger).model.layers[3].mlp.up_proj.weight
        )
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
        assert tokenizer.chat_template == AutoTokenizer.from_pretrained(larger).chat_template
        for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja"):
            assert (tmp_path / "base" / name).read_bytes() == (larger / name).read_bytes()

    def test_of_a_model_in_several_files_has_an_index(self, tmp_path: Path) -> None:
        from transformers import AutoModelForCausalLM

        larger = make_larger(tmp_path / "larger", max_shard_size="90KB")
        assert len(weight_files(larger)) > 2
        write_layers(larger, (0, 4), tmp_path / "base")
        check_layers(larger, tmp_path / "base", (0, 4))
        index = json.loads((tmp_path / "base" / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(stored(tmp_path / "base"))
        assert index["metadata"]["total_size"] == sum(map(len, stored(tmp_path / "base").values()))
        _, found = AutoModelForCausalLM.from_pretrained(tmp_path / "base", output_loading_info=True)
        assert not any(found.values())

    def test_leaves_code_and_pickles_behind(self, larger: Path, tmp_path: Path) -> None:
        source = shutil.copytree(larger, tmp_path / "source")
        for name in ("modeling_other.py", "pytorch_model.bin", "training_args.bin"):
            (source / name).write_text("x")
        (source / "LICENSE").write_text("terms")
        write_layers(source, (0,), tmp_path / "base")
        names = {path.name for path in (tmp_path / "base").iterdir()}
        assert "LICENSE" in names
        assert not {name for name in names if name.endswith((".py", ".bin"))}


class TestSettingsOfALayer:
    KINDS: ClassVar = ["full_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"]

    def make(self, folder: Path, **settings: Any) -> Path:
        """A model whose layers differ in what they attend to."""
        from transformers import Qwen3Config, Qwen3ForCausalLM

        make_tiny_model(folder)
        tiny = json.loads((folder / "config.json").read_text())
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
        config = Qwen3Config(**{name: tiny[name] for name in names}, num_hidden_layers=LAYERS, head_dim=32, **settings)
        Qwen3ForCausalLM(config).save_pretrained(folder)
        return folder

    def test_go_with_the_layer(self, tmp_path: Path) -> None:
        source = self.make(tmp_path / "source", use_sliding_window=True, sliding_window=8, layer_types=self.KINDS)
        write_layers(source, (0, 1, 4), tmp_path / "base")
        config = json.loads((tmp_path / "base" / "config.json").read_text())
        assert config["layer_types"] == [self.KINDS[0], self.KINDS[1], self.KINDS[4]]

    def test_that_follow_from_its_number_do_not_change_with_it(self, tmp_path: Path) -> None:
        """The layers from the third on attend to a window; the config says so by one number, not by a list."""
        source = self.make(tmp_path / "source", use_sliding_window=True, sliding_window=8, max_window_layers=3)
        plain = with_config(source, tmp_path / "plain", lambda config: config.pop("layer_types"))
        write_layers(plain, (1, 3, 4), tmp_path / "base")
        config = json.loads((tmp_path / "base" / "config.json").read_text())
        assert config["layer_types"] == ["full_attention", "sliding_attention", "sliding_attention"]


class TestRefused:
    def test_a_layer_that_is_not_there(self, larger: Path, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match="layer 5 is not there: the model has 5"):
            write_layers(larger, (0, 5), tmp_path / "base")
        assert not (tmp_path / "base").exists()

    def test_a_model_whose_layers_have_other_names(self, tmp_path: Path) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel

        GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=16)).save_pretrained(tmp_path / "gpt2")
        with pytest.raises(UsageError, match="layers cannot be taken from this model"):
            write_layers(tmp_path / "gpt2", (0,), tmp_path / "base")

    def test_a_model_without_safetensors(self, larger: Path, tmp_path: Path) -> None:
        shutil.copytree(larger, tmp_path / "pickled", ignore=shutil.ignore_patterns("*.safetensors"))
        with pytest.raises(UsageError, match="layers cannot be taken from this model"):
            write_layers(tmp_path / "pickled", (0,), tmp_path / "base")

    def test_layers_that_the_config_no_longer_describes(self, tmp_path: Path) -> None:
        """Whether a layer has experts follows from its number: every second one of this model."""
        from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

        config = Qwen2MoeConfig(
            vocab_size=16,
            hidden_size=8,
            intermediate_size=16,
            moe_intermediate_size=4,
            shared_expert_intermediate_size=4,
            num_experts=2,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=2,
            decoder_sparse_step=2,
        )
        Qwen2MoeForCausalLM(config).save_pretrained(tmp_path / "moe")
        with pytest.raises(UsageError, match="does not fit the chosen layers"):
            write_layers(tmp_path / "moe", (1, 3), tmp_path / "base")
        write_layers(tmp_path / "moe", (0, 3), tmp_path / "other")  # dense, then experts: as their new numbers say

    def test_layers_whose_numbers_shape_what_they_compute(self, tmp_path: Path) -> None:
        """How much DiffLlama subtracts follows from a layer's number, and is stored nowhere."""
        from transformers import DiffLlamaConfig, DiffLlamaForCausalLM

        config = DiffLlamaConfig(
            vocab_size=16, hidden_size=8, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2
        )
        DiffLlamaForCausalLM(config).save_pretrained(tmp_path / "diff")
        with pytest.raises(UsageError, match=r"layer 3 would compute something else as layer 1: .*lambda_init"):
            write_layers(tmp_path / "diff", (0, 3), tmp_path / "base")
        assert not (tmp_path / "base").exists()
        write_layers(tmp_path / "diff", (0, 1), tmp_path / "first")

    def test_a_list_that_may_go_by_layer_or_not(self, larger: Path, tmp_path: Path) -> None:
        odd = with_config(larger, tmp_path / "odd", lambda config: config.update(scales=[1.0] * LAYERS))
        with pytest.raises(UsageError, match="'scales' has as many entries as there are layers"):
            write_layers(odd, (0, 1), tmp_path / "base")

    def test_no_list_that_is_of_another_kind(self, larger: Path, tmp_path: Path) -> None:
        stops = list(range(LAYERS))
        several = with_config(larger, tmp_path / "several", lambda config: config.update(eos_token_id=stops))
        write_layers(several, (0, 1), tmp_path / "base")
        assert json.loads((tmp_path / "base" / "config.json").read_text())["eos_token_id"] == stops

    def test_a_hub_id_without_a_network(self, tmp_path: Path) -> None:
        from pipeline.core.config_train import StudentModel
        from pipeline.student.layers import source_folder

        student = StudentModel.model_validate(
            {"model": "nobody/nothing", "revision": "0" * 40, "init": {"from_teacher_layers": [0]}}
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
            with pytest.raises(UsageError, match="cannot be had from the hub"):
                source_folder(student)
