"""Full tuning and adapters of every kind on tiny models: what they learn, what is saved, and that both are the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import UsageError
from pipeline.core.record import Message
from tests.tiny_architectures import KINDS, change_rows, make_tiny_like
from tests.tiny_models import SPECIAL, make_tiny_model
from tests.training.test_resume import Trainings
from tests.training_rows import points, small_config, sum_row, train_here, write_dataset

PAD, BOS, STOP, SYSTEM, USER, ASSISTANT = range(len(SPECIAL))
UNTRAINED = {STOP: None, USER: None, ASSISTANT: 200}
"""What an enlarged vocabulary looks like: zeros, and a copy of another row."""
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ROWS = [sum_row(number) for number in range(44)]
LORA: dict[str, Any] = {"kind": "lora", "r": 8, "alpha": 16}
QLORA: dict[str, Any] = {**LORA, "kind": "qlora", "train_tokens": ["</s>"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset") / "dataset", ROWS[:40], ROWS[40:])


def tensors(folder: Path, name: str = "model.safetensors") -> dict[str, Any]:
    from safetensors.torch import load_file

    return dict(load_file(folder / name))


def load(folder: Path, **settings: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **settings).eval()


def logits(model: Any) -> Any:
    """Of a fixed text, template tokens included."""
    import torch

    ids = torch.tensor([[BOS, SYSTEM, 100, 101, USER, 102, 103, ASSISTANT, 104, STOP]])
    with torch.no_grad():
        return model(input_ids=ids).logits


def loss_of(model: Any, tokens: Path) -> float:
    """Mean loss of encoded rows, computed without anything of the trainer."""
    import pyarrow as pa
    import torch

    with pa.memory_map(str(tokens)) as file:
        rows = pa.ipc.open_stream(file).read_all().to_pylist()
    total = count = 0.0
    with torch.no_grad():
        for row in rows:
            out = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
            labels = torch.tensor(row["labels"][1:])
            total += float(torch.nn.functional.cross_entropy(out, labels, ignore_index=-100, reduction="sum"))
            count += int((labels != -100).sum())
    return total / count


def answer(folder: Path, prompt: str) -> str:
    """What a saved model generates with the settings it brings itself."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = load(folder).generate(**ids, do_sample=False, max_new_tokens=12)
    return str(tokenizer.decode(output[0, ids["input_ids"].shape[1] :]))


TUNINGS: dict[str, dict[str, Any]] = {
    "full": {"kind": "full"},
    "lora": LORA,
    "tokens": {**LORA, "train_tokens": ["</s>", "<|user|>"]},
    "embeddings": {**LORA, "modules_to_save": ["embed_tokens"]},
    "dora": {**LORA, "dora": True},
    "rslora": {**LORA, "rslora": True},
}


class TestWhatIsSavedIsWhatWasTrained:
    """The last measured loss is of the model in the trainer's hands; the saved folder alone must have the same."""

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("tied", [True, False])
    @pytest.mark.parametrize("tuning", ["full", "tokens"])
    def test_of_every_architecture(self, tmp_path: Path, dataset: Path, kind: str, tied: bool, tuning: str) -> None:
        base = make_tiny_like(tmp_path / "base", kind, tied=tied)
        attention = "eager" if kind == "gemma2" else "sdpa"
        job, _ = train_here(tmp_path, base, dataset, tuning=TUNINGS[tuning], attention=attention, max_steps=3)
        saved = load(job.out / "model", attn_implementation=attention)
        measured = points(job.out, "eval_loss")[-1]
        assert loss_of(saved, job.workdir / "validation.arrow") == pytest.approx(measured, abs=1e-5)
        assert measured < loss_of(load(base, attn_implementation=attention), job.workdir / "validation.arrow") - 0.1
        assert ("lm_head.weight" in tensors(job.out / "model")) is not tied
        assert (saved.lm_head.weight is saved.model.embed_tokens.weight) is tied

    @pytest.mark.parametrize("tied", [True, False])
    @pytest.mark.parametrize("name", [name for name in TUNINGS if name != "full"])
    def test_of_every_kind_of_adapter(self, tmp_path: Path, dataset: Path, name: str, tied: bool) -> None:
        """And PEFT, given the base and the adapter's folder, has the same model again."""
        import torch
        from peft import PeftModel

        base = make_tiny_like(tmp_path / "base", "llama", tied=tied)
        job, found = train_here(tmp_path, base, dataset, tuning=TUNINGS[name], max_steps=4)
        saved = load(job.out / "model")
        measured = points(job.out, "eval_loss")[-1]
        assert loss_of(saved, job.workdir / "validation.arrow") == pytest.approx(measured, abs=1e-5)
        again = PeftModel.from_pretrained(load(base), job.out / "adapter").eval()
        torch.testing.assert_close(logits(again), logits(saved), atol=1e-5, rtol=0)
        assert (logits(saved) - logits(load(base))).abs().max() > 1e-2
        expected = ["</s>", "<|user|>"] if name == "tokens" else []
        assert found["metrics"]["trained_tokens_of_template"] == expected

    def test_only_the_rows_of_trained_tokens_change(self, tmp_path: Path, model: Path, dataset: Path) -> None:
        job, _ = train_here(tmp_path, model, dataset, tuning=TUNINGS["tokens"], max_steps=3)
        before, after = (tensors(folder)["model.embed_tokens.weight"] for folder in (model, job.out / "model"))
        assert (before != after).any(dim=1).nonzero().flatten().tolist() == [STOP, USER]


class TestTokensThatTheBaseNeverLearned:
    """Adapters on a base whose template's tokens have rows of zeros, or the row of another token."""

    @pytest.mark.parametrize("tied", [True, False])
    def test_without_them_the_student_cannot_stop_and_with_them_it_does(self, tmp_path: Path, tied: bool) -> None:
        rows = [sum_row(number, completion=(Message("assistant", "Monday"),)) for number in range(40)]
        dataset = write_dataset(tmp_path / "dataset", rows)
        base = change_rows(make_tiny_like(tmp_path / "base", "llama", tied=tied), UNTRAINED)
        losses = {}
        changes: dict[str, Any] = {"epochs": 10, "learning_rate": 1e-2, "accept_findings": ["PF16"]}
        for name, tokens in (("none", []), ("auto", "auto")):
            tuning = {**LORA, "train_tokens": tokens}
            job, found = train_here(tmp_path / name, base, dataset, tuning=tuning, **changes)
            losses[name] = points(job.out, "loss")[-1]
            expected = ["</s>", "<|user|>", "<|assistant|>"] if name == "auto" else []
            assert found["metrics"]["trained_tokens_of_template"] == expected
            said = answer(job.out / "model", "What is 55 + 1?")
            assert (said == "Monday</s>") is (name == "auto"), (name, said)
        assert losses["auto"] < 0.5, losses
        assert losses["none"] > 1.5, losses

    @pytest.mark.parametrize("tied", [True, False])
    def test_their_gradient_arrives_through_trls_head(self, tmp_path: Path, tied: bool) -> None:
        """TRL's head reads the output layer's weight instead of calling the layer."""
        import torch
        from trl.trainer.utils import add_fused_lm_head

        from pipeline.core.config_train import LoraTuning
        from pipeline.student.adapters import with_adapters

        base = load(make_tiny_like(tmp_path / "base", "llama", tied=tied))
        adapted = with_adapters(base, LoraTuning(kind="lora"), [STOP, USER])
        rows = {name: p for name, p in adapted.named_parameters() if "trainable_tokens_delta" in name}
        assert len(rows) == (1 if tied else 2)
        with torch.no_grad():
            for parameter in rows.values():
                parameter += 0.1
        add_fused_lm_head(adapted.get_base_model())
        ids = torch.tensor([[BOS, USER, 100, ASSISTANT, 101, STOP]])
        found = []
        for fused in ({"fused_lm_head": True}, {}):
            adapted.zero_grad()
            loss = adapted(input_ids=ids, labels=ids, **fused).loss
            loss.backward()
            found.append((loss.detach(), {name: p.grad.clone() for name, p in rows.items() if p.grad is not None}))
        torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-4)
        assert len(found[0][1]) == len(rows)
        assert all(grad.abs().amax(dim=1).max() > 1e-3 for grad in found[0][1].values())


class TestLora:
    @pytest.mark.parametrize("modules", [(), ("embed_tokens",)])
    def test_it_trains_and_is_merged(
        self, tmp_path: Path, model: Path, dataset: Path, modules: tuple[str, ...]
    ) -> None:
        tuning = {**LORA, "modules_to_save": modules}
        job, found = train_here(tmp_path, model, dataset, tuning=tuning, epochs=6, learning_rate=1e-2)
        metrics = found["metrics"]
        assert 0 < metrics["trainable_parameters"] < metrics["parameters"]
        losses = points(job.out, "loss")
        assert losses[-1] < losses[0] - 0.5
        before, after = tensors(model), tensors(job.out / "model")
        assert set(after) == set(before), "a plain model: no adapter's tensors, no untied output layer"
        changed = {name for name in before if not before[name].equal(after[name])}
        linear = {name for name in before if any(part in name for part in LINEAR)}
        assert changed == linear | ({"model.embed_tokens.weight"} if modules else set())

    def test_accumulation_changes_nothing(self, tmp_path: Path, model: Path, dataset: Path) -> None:
        tuning = {**LORA, "train_tokens": ["</s>"]}
        whole, _ = train_here(tmp_path / "8x1", model, dataset, tuning=tuning)
        parts, _ = train_here(tmp_path / "4x2", model, dataset, tuning=tuning, micro_batch_size=4)
        for name in ("loss", "grad_norm", "eval_loss"):
            assert points(parts.out, name) == pytest.approx(points(whole.out, name), abs=1e-5, rel=1e-4)

    def test_the_seed_decides_the_initial_values(self, tmp_path: Path, model: Path, dataset: Path) -> None:
        changes: dict[str, Any] = {"tuning": LORA, "max_steps": 2, "group_by_length": False}
        outs = [
            train_here(tmp_path / name, model, dataset, seed=seed, **changes)[0].out
            for name, seed in (("first", 0), ("second", 0), ("other", 1))
        ]
        first, second, other = ({file.name: file.read_bytes() for file in (out / "adapter").iterdir()} for out in outs)
        assert first == second
        assert first["adapter_model.safetensors"] != other["adapter_model.safetensors"]

    @pytest.mark.parametrize(("name", "scale"), [("lora", 16 / 8), ("rslora", 16 / 8**0.5)])
    def test_the_scale_of_what_is_merged(
        self, tmp_path: Path, model: Path, dataset: Path, name: str, scale: float
    ) -> None:
        import torch

        job, _ = train_here(tmp_path, model, dataset, tuning=TUNINGS[name], max_steps=3)
        before, after = tensors(model), tensors(job.out / "model")
        adapter = tensors(job.out / "adapter", "adapter_model.safetensors")
        for layer in range(2):
            linear = f"model.layers.{layer}.mlp.up_proj"
            a, b = (adapter[f"base_model.model.{linear}.lora_{part}.weight"] for part in "AB")
            assert b.abs().max() > 1e-4, "this block is trained"
            grown = after[f"{linear}.weight"] - before[f"{linear}.weight"]
            torch.testing.assert_close(grown, scale * b @ a, atol=1e-6, rtol=1e-4)

    def test_dora_and_rslora_are_other_trainings(self, tmp_path: Path, model: Path, dataset: Path) -> None:
        curves = {
            name: points(train_here(tmp_path / name, model, dataset, tuning=TUNINGS[name])[0].out, "loss")
            for name in ("lora", "dora", "rslora")
        }
        assert curves["dora"][0] == pytest.approx(curves["lora"][0], abs=1e-5), "they begin as the same model"
        assert curves["rslora"][0] == pytest.approx(curves["lora"][0], abs=1e-5)
        ends = [curve[-1] for curve in curves.values()]
        assert min(abs(ends[i] - ends[j]) for i, j in ((0, 1), (0, 2), (1, 2))) > 1e-4

    def test_the_adapter_tells_no_path(self, tmp_path: Path, model: Path, dataset: Path) -> None:
        job, _ = train_here(tmp_path, model, dataset, tuning=LORA, max_steps=1)
        assert {path.name for path in (job.out / "adapter").iterdir()} == {
            "adapter_config.json",
            "adapter_model.safetensors",
        }
        text = (job.out / "adapter" / "adapter_config.json").read_text("utf-8")
        config = json.loads(text)
        assert config["base_model_name_or_path"] == "local"
        assert str(model) not in text and str(tmp_path) not in text
        assert {name.rpartition(".")[2] for name in config["target_modules"]} == set(LINEAR)


class TestWhatCannotBeAdapted:
    @pytest.mark.parametrize(
        ("tuning", "told"),
        [
            ({"target_modules": ["no_such_module"]}, "the model has no module 'no_such_module'"),
            ({"target_modules": "no_such_module"}, "no module's full name matches 'no_such_module'"),
            ({"target_modules": "(q_proj"}, "is no regular expression"),
            ({"target_modules": ["q_proj", "no_such_module"]}, "the model has no module 'no_such_module'"),
            ({"modules_to_save": ["no_such_module"]}, "the model has no module 'no_such_module'"),
            ({"target_modules": ".*(q_proj|lm_head)"}, "lm_head cannot have an adapter"),
            ({"target_modules": ["q_proj", "lm_head"]}, "lm_head cannot have an adapter"),
            ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens cannot have an adapter"),
            ({"target_modules": ".*(q_proj|embed_tokens)"}, "share one weight"),
        ],
    )
    def test_modules(self, tmp_path: Path, model: Path, dataset: Path, tuning: dict[str, Any], told: str) -> None:
        with pytest.raises(UsageError, match=told):
            train_here(tmp_path, model, dataset, tuning={"kind": "lora", **tuning})

    @pytest.mark.parametrize(
        ("tuning", "hint"),
        [
            ({"target_modules": ["q_porj"]}, "did you mean 'q_proj'?"),
            ({"target_modules": ["self_attn.q_porj"]}, "did you mean 'q_proj'?"),
            ({"modules_to_save": ["embed_token"]}, "did you mean 'embed_tokens'?"),
            (
                {"target_modules": ["xyz"]},
                "valid here: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj",
            ),
        ],
    )
    def test_a_typo_is_told_with_names_of_the_model_itself(
        self, tmp_path: Path, model: Path, dataset: Path, tuning: dict[str, Any], hint: str
    ) -> None:
        with pytest.raises(UsageError) as caught:
            train_here(tmp_path, model, dataset, tuning={"kind": "lora", **tuning})
        (field,) = tuning
        assert (caught.value.where, caught.value.todo) == (f"train.tuning.{field}", hint)


class TestQlora:
    @pytest.mark.parametrize("settings", [{}, {"quant_type": "fp4", "double_quant": False}, {"dora": True}])
    def test_it_learns_on_four_bits_and_is_merged_into_the_bases_own_weights(
        self, tmp_path: Path, model: Path, dataset: Path, settings: dict[str, Any]
    ) -> None:
        import torch
        from peft import PeftModel

        changes: dict[str, Any] = {"epochs": 4, "learning_rate": 1e-2}
        job, found = train_here(tmp_path, model, dataset, tuning=QLORA | settings, **changes)
        losses = points(job.out, "loss")
        assert losses[-1] < losses[0] - 0.5
        assert found["metrics"]["parameters"] == sum(tensor.numel() for tensor in tensors(model).values())
        saved = load(job.out / "model")
        again = PeftModel.from_pretrained(load(model), job.out / "adapter").eval()
        torch.testing.assert_close(logits(again), logits(saved), atol=1e-4, rtol=0)
        before, after = tensors(model), tensors(job.out / "model")
        same = {name for name in before if before[name].equal(after[name])}
        assert same == {name for name in before if "norm" in name}
        measured = points(job.out, "eval_loss")[-1]
        merged = loss_of(saved, job.workdir / "validation.arrow")
        assert merged != pytest.approx(measured, abs=1e-6), "it was measured on rounded weights"
        assert merged == pytest.approx(measured, abs=0.3)

    def test_it_is_another_training_than_lora(self, tmp_path: Path, model: Path, dataset: Path) -> None:
        curves = [
            points(train_here(tmp_path / kind, model, dataset, tuning=QLORA | {"kind": kind})[0].out, "loss")
            for kind in ("lora", "qlora")
        ]
        assert curves[0] != pytest.approx(curves[1], abs=1e-5)
        assert curves[0] == pytest.approx(curves[1], abs=0.3)

    def test_what_is_trained_stays_in_float32(self, tmp_path: Path) -> None:
        """TRL rounds the adapters of a quantised base to bfloat16."""
        trainings = Trainings(tmp_path)
        attempt = trainings.attempt("one", 2, tuning=QLORA)
        attempt.stop()
        held = tensors(attempt.job.workdir / "checkpoints" / "step-2", "trained.safetensors")
        assert len(held) == 2 * 2 * 7 + 1, "A and B of 7 linear modules in 2 layers, and the token's row"
        assert {str(tensor.dtype) for tensor in held.values()} == {"torch.float32"}
        a = next(tensor for name, tensor in held.items() if "lora_A" in name)
        assert not a.equal(a.bfloat16().float())

    def test_under_fsdp_it_is_refused(self) -> None:
        from pipeline.student.quantised import require_quantisable

        require_quantisable({})
        with pytest.raises(UsageError, match="not supported under FSDP"):
            require_quantisable({"ACCELERATE_USE_FSDP": "true"})


class TestResuming:
    @pytest.mark.parametrize(
        "tuning",
        [
            {"kind": "lora", "dropout": 0.2, "train_tokens": ["</s>", "<|user|>"]},
            {"kind": "lora", "dropout": 0.2, "dora": True},
            {"kind": "qlora", "dropout": 0.2, "train_tokens": ["</s>"]},
        ],
        ids=["tokens", "dora", "qlora"],
    )
    def test_stopped_and_resumed_equals_straight(self, tmp_path: Path, tuning: dict[str, Any]) -> None:
        trainings = Trainings(tmp_path)
        straight = trainings.attempt("straight", tuning=tuning)
        found = straight.run()
        trainings.attempt("stopped", 5, tuning=tuning).stop()
        resumed = trainings.attempt("stopped", tuning=tuning)
        assert resumed.run() == found
        assert resumed.started["resumed_from"] == 5
        assert resumed.written == straight.written


class TestNumberFormats:
    def test_frozen_weights_stay_in_bfloat16_and_what_is_trained_does_not(self, tmp_path: Path, dataset: Path) -> None:
        base = make_tiny_like(tmp_path / "base", "llama", dtype="bfloat16")
        tuning = {**LORA, "train_tokens": ["</s>"]}
        job, _ = train_here(
            tmp_path, base, dataset, tuning=tuning, precision="bfloat16", checkpoint={"minutes": None, "steps": 2}
        )
        held = tensors(job.workdir / "checkpoints" / "step-2", "trained.safetensors")
        assert {str(tensor.dtype) for tensor in held.values()} == {"torch.float32"}
        after = tensors(job.out / "model")
        assert {str(tensor.dtype) for tensor in after.values()} == {"torch.bfloat16"}
        adapter = tensors(job.out / "adapter", "adapter_model.safetensors")
        assert {str(tensor.dtype) for tensor in adapter.values()} == {"torch.float32"}
        losses = points(job.out, "loss")
        assert losses[-1] < losses[0]

    def test_adapters_on_rounded_weights_are_merged_into_the_stored_ones(
        self, tmp_path: Path, model: Path, dataset: Path
    ) -> None:
        changes: dict[str, Any] = {"tuning": {**LORA, "target_modules": ["q_proj"]}, "max_steps": 2}
        job, _ = train_here(tmp_path, model, dataset, **changes, weights="bfloat16", precision="bfloat16")
        before, after = tensors(model), tensors(job.out / "model")
        assert {name for name in before if not before[name].equal(after[name])} == {
            f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(2)
        }

    @pytest.mark.parametrize("modules", [("embed_tokens",), ("lm_head",)])
    def test_embeddings_trained_in_full_over_frozen_bfloat16(
        self, tmp_path: Path, dataset: Path, modules: tuple[str, ...]
    ) -> None:
        base = make_tiny_like(tmp_path / "base", "llama", dtype="bfloat16")
        tuning = {**LORA, "modules_to_save": modules}
        job, _ = train_here(tmp_path, base, dataset, tuning=tuning, precision="bfloat16")
        losses = points(job.out, "loss")
        assert losses[-1] < losses[0]
        assert "lm_head.weight" not in tensors(job.out / "model"), "still tied"

    def test_full_tuning_in_bfloat16_is_told_to_lose_small_updates(
        self, tmp_path: Path, model: Path, dataset: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        job, _ = train_here(tmp_path, model, dataset, weights="bfloat16", precision="bfloat16", max_steps=1)
        assert "torch.bfloat16: updates below a 256th of a weight are lost" in caplog.text
        assert {str(tensor.dtype) for tensor in tensors(job.out / "model").values()} == {"torch.float32"}

    def test_float32_arithmetic_on_bfloat16_weights(self, tmp_path: Path, model: Path, dataset: Path) -> None:
        with pytest.raises(UsageError, match="bfloat16 weights cannot be trained in float32"):
            train_here(tmp_path, model, dataset, weights="bfloat16")

    @pytest.mark.parametrize(
        ("kind", "precision", "stored", "expected"),
        [
            ("full", "bfloat16", "bfloat16", "float32"),
            ("lora", "bfloat16", "bfloat16", "bfloat16"),
            ("qlora", "bfloat16", "bfloat16", "bfloat16"),
            ("lora", "bfloat16", "float32", "float32"),
            ("lora", "bfloat16", "float16", "float32"),
            ("lora", "float32", "bfloat16", "float32"),
        ],
    )
    def test_auto(self, kind: str, precision: str, stored: str, expected: str) -> None:
        import torch
        from transformers import LlamaConfig

        from pipeline.student.initial import held_dtype

        config = small_config(tuning={"kind": kind}, precision=precision)
        assert held_dtype(config, LlamaConfig(dtype=stored)) == getattr(torch, expected)


class TestWhatIsNotLoaded:
    def test_a_base_that_brings_code_of_its_own(self, tmp_path: Path, dataset: Path) -> None:
        base = make_tiny_model(tmp_path / "base")
        config = json.loads((base / "config.json").read_text())
        config |= {
            "model_type": "ours",
            "auto_map": {"AutoConfig": "ours.C", "AutoModelForCausalLM": "ours.M"},
        }
        (base / "config.json").write_text(json.dumps(config))
        (base / "ours.py").write_text(f"open({str(tmp_path / 'was-run')!r}, 'w')")
        with pytest.raises(UsageError, match="trust_remote_code is never used"):
            train_here(tmp_path, base, dataset)
        assert not (tmp_path / "was-run").exists()

    def test_a_base_whose_weights_are_pickled(self, tmp_path: Path, dataset: Path) -> None:
        import torch

        base = make_tiny_model(tmp_path / "base")
        torch.save(tensors(base), base / "pytorch_model.bin")
        (base / "model.safetensors").unlink()
        with pytest.raises(UsageError, match=r"pickled \(pytorch_model.bin\)") as caught:
            train_here(tmp_path, base, dataset)
        assert "convert them once" in caught.value.todo

    def test_a_base_that_is_stored_quantised(self, tmp_path: Path, dataset: Path) -> None:
        base = make_tiny_model(tmp_path / "base")
        config = json.loads((base / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
        (base / "config.json").write_text(json.dumps(config))
        with pytest.raises(UsageError, match="stored quantised"):
            train_here(tmp_path, base, dataset, tuning={"kind": "qlora"})


class TestAttention:
    @pytest.mark.parametrize(
        ("device", "precision", "told"),
        [("cpu", "bfloat16", "needs a GPU"), ("cuda", "bfloat16", "flash-attn is not installed")],
    )
    def test_flash_attention_where_it_cannot_run(self, device: str, precision: str, told: str) -> None:
        import torch
        from transformers import LlamaConfig
        from transformers.utils import is_flash_attn_2_available

        from pipeline.student.initial import require_attention

        if device == "cuda" and is_flash_attn_2_available():
            told, precision = "does not compute in float32", "float32"
        config = small_config(attention="flash_attention_2", precision=precision)
        with pytest.raises(UsageError, match=told):
            require_attention(config, LlamaConfig(), torch.device(device))

    def test_a_soft_cap_that_sdpa_leaves_out(self, tmp_path: Path, dataset: Path) -> None:
        base = make_tiny_like(tmp_path / "base", "gemma2")
        with pytest.raises(UsageError, match="caps its attention's logits"):
            train_here(tmp_path, base, dataset)

    def test_eager_and_sdpa_are_the_same_training(self, tmp_path: Path, model: Path, dataset: Path) -> None:
        curves = [
            points(train_here(tmp_path / name, model, dataset, attention=name, max_steps=3)[0].out, "loss")
            for name in ("eager", "sdpa")
        ]
        assert curves[0] == pytest.approx(curves[1], abs=1e-4)


@pytest.mark.gpu
class TestOnAGpu:
    """The number formats that GPUs are used with; skipped, with the reason, where there is none."""

    @pytest.fixture(autouse=True)
    def _needs_a_gpu(self) -> None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no GPU")

    @pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
    @pytest.mark.parametrize("kind", ["full", "lora", "qlora"])
    def test_it_learns_and_is_saved_as_it_was_trained(
        self, tmp_path: Path, dataset: Path, kind: str, attention: str
    ) -> None:
        if attention == "flash_attention_2":
            pytest.importorskip("flash_attn")
        base = make_tiny_like(tmp_path / "base", "llama", dtype="bfloat16")
        tuning = {"kind": "full"} if kind == "full" else {**QLORA, "kind": kind}
        changes: dict[str, Any] = {"precision": "bfloat16", "attention": attention, "epochs": 4}
        job, _ = train_here(tmp_path, base, dataset, tuning=tuning, **changes)
        losses = points(job.out, "loss")
        assert losses[-1] < losses[0] - 0.3
        saved = loss_of(load(job.out / "model"), job.workdir / "validation.arrow")
        assert saved == pytest.approx(points(job.out, "eval_loss")[-1], abs=0.3 if kind == "qlora" else 0.05)

    def test_four_bits_take_less_memory(self, tmp_path: Path) -> None:
        import torch

        from pipeline.core.config_train import StudentModel
        from pipeline.student.initial import load_student
        from pipeline.student.jobs import TrainJob

        base = make_tiny_like(tmp_path / "base", "llama", dtype="bfloat16")
        held = {}
        for kind in ("lora", "qlora"):
            config = small_config(tuning={"kind": kind}, precision="bfloat16")
            job = TrainJob(config, StudentModel(model=str(base)), tmp_path, tmp_path, tmp_path, 1, "test")
            model = load_student(job, (STOP,), torch.device("cuda")).model
            held[kind] = sum(
                p.numel() * p.element_size() for name, p in model.named_parameters() if "base_layer" in name
            )
        assert held["qlora"] < held["lora"] / 3
