"""The model card: the numbers of its own run; and the way to the Hub and back, through a stand-in on loopback."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard, ModelCardData
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Seq2SeqTrainingArguments, Trainer, TrainingArguments

from hf_gradtools.grit import GritCallback, GritConfig, GritTrainer
from hf_gradtools.grit.card import write_grit_card
from hf_gradtools.hub import write_card
from tests.hub_stub import HubStub


ROOT = Path(__file__).parents[2]
VOCABULARY = 67
OPTIONS = {
    "r": 8, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM", "kfac_min_samples": 16,
    "kfac_update_freq": 2, "grit_cov_update_freq": 1, "reprojection_freq": 3, "min_lora_rank": 2,
    "rank_adaptation_threshold": 0.9,
}  # fmt: skip
TRAINING = {
    "max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": "none", "logging_steps": 2,
    "save_strategy": "no", "eval_strategy": "steps", "eval_steps": 3, "eval_on_start": True, "use_cpu": True,
    "disable_tqdm": True,
}  # fmt: skip


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
    )
    return LlamaForCausalLM(config)


def rows():
    ids = torch.randint(0, VOCABULARY, (24, 12), generator=torch.Generator().manual_seed(1)).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def grit_trainer(folder, base=None, options=OPTIONS, **training):
    model = get_peft_model(base or llama(), GritConfig(**options))
    args = Seq2SeqTrainingArguments(str(folder), **{**TRAINING, **training})
    return GritTrainer(model, args, train_dataset=rows(), eval_dataset=rows())


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=torch.arange(12)[None]).logits


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A trainer after a short run, whose card is in its output_dir."""
    trainer = grit_trainer(tmp_path_factory.mktemp("trained") / "tiny-grit")
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(license="mit", tags=["mine"], finetuned_from="user/base", dataset_tags="user/rows")
    return trainer


def card_of(trainer):
    return ModelCard.load(Path(trainer.args.output_dir) / "README.md")


def ranks_of(trainer):
    return json.loads((Path(trainer.args.output_dir) / "grit_ranks.json").read_text())


def table(text):
    """The cells of each line of a card's tables, by the first."""
    lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line[:2] == "| "]
    return {line[0].strip("`"): [cell.strip("`") for cell in line[1:]] for line in lines}


def test_ranks_and_parameters_are_the_runs_own(trained):
    report, lines = ranks_of(trained), table(card_of(trained).text)
    assert any(row["rank"] < row["base_rank"] for row in report["layers"].values())
    columns = ["rank", "base_rank", "k_a", "k_b"]
    for name, row in report["layers"].items():
        assert lines[name][:4] == [str(row[column]) for column in columns]
        for cell, column in zip(lines[name][4:], ["effective_rank_a", "effective_rank_g"], strict=False):
            assert float(cell) == pytest.approx(row[column], rel=1e-3)
        for cell, column in zip(lines[name][6:], ["top_eigenvalue_a", "top_eigenvalue_g"], strict=True):
            assert float(cell) == pytest.approx(row[column], rel=1e-3)
    assert lines["adapter parameters"] == [f"{report['base_parameters']:,}", f"{report['parameters']:,}"]
    assert f"{100 * report['reduction']:.1f} % fewer parameters" in card_of(trained).text
    now = sum(p.numel() for p in trained.model.parameters() if p.requires_grad)
    assert lines["adapter parameters"][1] == f"{now:,}"


def test_training_figures_are_the_trainers(trained):
    lines, history = table(card_of(trained).text), trained.state.log_history
    assert lines["optimizer steps"] == ["6"]
    evals = {row["step"]: row["eval_loss"] for row in history if "eval_loss" in row}
    for step in (0, 6):
        assert float(lines[f"eval loss at step {step}"][0]) == pytest.approx(evals[step], rel=1e-3)
    loss = [row["loss"] for row in history if "loss" in row][-1]
    assert float(lines["training loss at step 6"][0]) == pytest.approx(loss, rel=1e-3)
    assert lines["reprojection_freq"] == ["3"]
    assert lines["learning_rate"] == ["0.01"]


def test_metadata_is_what_the_hub_reads(trained):
    data = card_of(trained).data
    assert {"peft", "grit", "lora", "mine", "base_model:adapter:user/base"} <= set(data.tags)
    assert (data.library_name, data.pipeline_tag) == ("peft", "text-generation")
    assert (data.base_model, data.license, data.datasets) == ("user/base", "mit", "user/rows")


def test_loading_code_of_the_card_is_python_that_names_both_models(trained):
    code = re.search(r"```python\n(.*?)```", card_of(trained).text, re.DOTALL)[1]
    compile(code, "card", "exec")
    assert code.startswith("import hf_gradtools\n")
    assert 'AutoModelForCausalLM.from_pretrained("user/base")' in code
    assert 'PeftModel.from_pretrained(base, "tiny-grit")' in code


def test_saving_again_keeps_the_card(trained, tmp_path):
    trained.create_model_card()
    before = card_of(trained)
    trained.model.save_pretrained(trained.args.output_dir)
    after = card_of(trained)
    assert after.text.strip() == before.text.strip()
    assert {"peft", "grit", "lora"} <= set(after.data.tags)
    trained.model.save_pretrained(tmp_path)  # PEFT's own card, without ours
    assert {"peft", "grit", "lora"} <= set(ModelCard.load(tmp_path / "README.md").data.tags)


def test_folder_of_the_base_model_stays_out(trained, tmp_path):
    (tmp_path / "base").mkdir()
    card = write_grit_card(tmp_path / "run", trained.controller, base_model=str(tmp_path / "base"))
    assert card.data.base_model is None
    assert "adapter of `base`" in card.text
    assert str(tmp_path) not in str(card)


def test_what_is_not_known_is_left_out(tmp_path):
    layers = {"model.layers.0.fc": {"rank": 4, "base_rank": 4, "parameters": 64}}
    report = {"layers": layers, "parameters": 64, "base_parameters": 64, "reduction": 0.0}
    card = write_grit_card(tmp_path, report)
    assert "All 1 layers kept the rank" in card.text
    assert table(card.text)["model.layers.0.fc"] == ["4", "4"]
    for absent in (
        "None",
        "eigenvalue",
        "k_a",
        "## GRIT settings",
        "## Training figures",
        "Hyperparameters",
        "PEFT 0",
    ):
        assert absent not in card.text
    assert card.data.base_model is None
    assert (tmp_path / "README.md").read_text() == str(card)


def test_report_beside_a_saved_adapter_finds_its_config(trained):
    folder = Path(trained.args.output_dir)
    card = write_grit_card(folder, folder / "grit_ranks.json")
    lines = table(card.text)
    assert lines["rank_adaptation_threshold"] == ["0.9"]
    assert lines["optimizer steps"] == ["6"]
    assert card.data.pipeline_tag == "text-generation"
    trained.create_model_card()


def test_trainer_without_a_run_has_no_figures(tmp_path):
    trainer = grit_trainer(tmp_path, options={**OPTIONS, "target_modules": r".*\.(q|v)_proj"})
    trainer.create_model_card(model_name="named")
    card = card_of(trainer)
    assert card.text.strip().startswith("# named\n")
    assert "## Training figures" not in card.text
    assert "All 4 layers kept the rank" in card.text
    assert "| `target_modules` | `.*\\.(q\\|v)_proj` |" in card.text


def test_only_the_first_process_writes(trained, tmp_path, monkeypatch):
    trainer = grit_trainer(tmp_path)
    monkeypatch.setattr(trainer, "is_world_process_zero", lambda: False)
    trainer.create_model_card()
    assert write_grit_card(tmp_path, trained.controller, trainer) is None
    monkeypatch.setattr("hf_gradtools.grit.card.rank", lambda: 1)
    assert write_grit_card(tmp_path, trained.controller) is None
    assert not (tmp_path / "README.md").exists()


def test_callback_writes_a_card_of_any_trainer(tmp_path):
    callback = GritCallback()
    with pytest.raises(ValueError, match=r"Call train\(\)"):
        callback.write_card(tmp_path)
    args = TrainingArguments(str(tmp_path), **{**TRAINING, "eval_strategy": "no", "eval_on_start": False})
    model = get_peft_model(llama(), GritConfig(**OPTIONS))
    trainer = Trainer(model, args, train_dataset=rows(), callbacks=[callback])
    trainer.train()
    model.add_model_tags("sft")  # as TRL's trainers do
    card = callback.write_card(tmp_path, license="mit")
    assert {"peft", "grit", "lora", "sft"} == set(card.data.tags)
    lines = table(card.text)
    assert {name: int(lines[name][0]) for name in model.base_model.ranks()} == model.base_model.ranks()
    assert card.data.license == "mit"
    assert "eval loss" not in card.text
    callback.set_trainer(trainer)
    assert "mean training loss" in callback.write_card(tmp_path).text


def test_wrong_source_and_template_are_refused(tmp_path):
    with pytest.raises(ValueError, match="the report has no layers"):
        write_grit_card(tmp_path, {"layers": {}})
    with pytest.raises(ValueError, match=r"template_name='other.md' is unknown. Pass one of .*grit_card.md"):
        write_card(tmp_path, "other.md", ModelCardData())


def test_card_that_fails_to_be_written_leaves_the_old(trained, tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("old")

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr("hf_gradtools.core.store.os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_grit_card(tmp_path, trained.controller)
    assert [file.name for file in tmp_path.iterdir()] == ["README.md"]
    assert (tmp_path / "README.md").read_text() == "old"


# ---- the Hub


def push(folder):
    """Runs in a process of its own: trains on a base model of the Hub, and pushes by the trainer and by the model."""
    llama().push_to_hub("user/base")
    base = LlamaForCausalLM.from_pretrained("user/base")
    trainer = grit_trainer(Path(folder) / "run", base, hub_model_id="user/trained")
    trainer.train()
    trainer.push_to_hub(dataset_tags="user/rows")
    trainer.model.push_to_hub("user/trained", commit_message="again")  # the card of the Hub stays
    trainer.model.push_to_hub("user/adapter")
    trainer._grit.write_card(Path(folder) / "card", model_name="user/adapter").push_to_hub("user/adapter")
    torch.save(logits(trainer.model), Path(folder) / "logits.pt")


def load(folder):
    """Runs in another process: what was pushed comes back."""
    from peft import AutoPeftModelForCausalLM

    from hf_gradtools.grit import export_lora

    def base():
        return LlamaForCausalLM.from_pretrained("user/base")

    wanted = torch.load(Path(folder) / "logits.pt")
    export_lora("user/trained", Path(folder) / "lora")
    models = [
        PeftModel.from_pretrained(base(), "user/adapter"),
        AutoPeftModelForCausalLM.from_pretrained("user/trained"),
        PeftModel.from_pretrained(base(), str(Path(folder) / "lora")),
    ]
    assert [str(model.peft_config["default"].peft_type.value) for model in models] == ["GRIT", "GRIT", "LORA"]
    assert all(torch.equal(logits(model), wanted) for model in models)
    assert not torch.equal(logits(base()), wanted)
    cards = [ModelCard.load(name) for name in ("user/trained", "user/adapter")]
    (Path(folder) / "cards.json").write_text(json.dumps([[card.data.to_dict(), card.text] for card in cards]))


def test_hub_round_trip(tmp_path):
    with HubStub() as hub:
        for function in ("push", "load"):
            command = f"from tests.grit.test_card import {function}; {function}({str(tmp_path)!r})"
            done = subprocess.run(
                [sys.executable, "-c", command], cwd=ROOT, env=hub.environ(tmp_path / function), capture_output=True,
                text=True,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr[-3000:]
        report = json.loads(hub.files("user/trained")["grit_ranks.json"])
    assert any(row["rank"] < row["base_rank"] for row in report["layers"].values())
    for name, (data, text) in zip(
        ("user/trained", "user/adapter"), json.loads((tmp_path / "cards.json").read_text()), strict=True
    ):
        lines = table(text)
        assert {layer: int(lines[layer][0]) for layer in report["layers"]} == {
            layer: row["rank"] for layer, row in report["layers"].items()
        }
        assert {"peft", "grit", "lora"} <= set(data["tags"])
        assert data["base_model"] == "user/base"
        assert f'PeftModel.from_pretrained(base, "{name}")' in text
