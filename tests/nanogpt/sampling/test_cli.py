import json
import re

import pytest
import torch

from hf_gradtools.nanogpt import NanoGPTConfig, NanoGPTForCausalLM
from hf_gradtools.nanogpt.sampling.cli import main


TASK = """
task: tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/rows.json}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: ["a", "b"]
doc_to_target: 0
"""


@pytest.fixture
def folder(tmp_path, chars):
    """A saved model with its tokenizer."""
    config = NanoGPTConfig(vocab_size=len(chars), block_size=16, n_layer=1, n_head=2, n_embd=16, initializer_range=0.5)
    model = tmp_path / "model"
    NanoGPTForCausalLM(config).save_pretrained(model)
    chars.save_pretrained(model)
    return model


@pytest.fixture
def sample(folder, capsys):
    """Runs the command line on it; what it printed."""

    def run(*argv):
        main(["--out_dir", str(folder), "--device", "cpu", "--max_new_tokens", "20", *argv])
        return capsys.readouterr().out

    return run


def test_samples_are_printed_and_added_to_a_file(sample, tmp_path):
    file = tmp_path / "new" / "samples.txt"
    printed = sample("--start", "[a] ", "--top_k", "1", "5", "--num_samples", "2", "--sample_file", str(file))
    first = file.read_text()
    texts = re.findall(r"--- (.*), seed 1337\n(\[a\] [^Z]{20})\n\n", first)
    assert [name for name, _ in texts] == [f"top_k {k}, sample {n}" for k in (1, 5) for n in (1, 2)]
    assert texts[0][1] == texts[1][1]  # the likeliest tokens, twice
    assert texts[2][1] != texts[3][1]
    assert all(text in printed for _, text in texts)
    sample("--sample_file", str(file), "--num_samples", "1")
    assert file.read_text().startswith(first + "--- top_k 200, sample 1, seed 1337\n\n")


def test_colors_and_heatmaps_go_to_the_folder(sample, folder):
    sample("--start", "[/]", "--colorize_output", "--colorize_mode", "all", "--show_heatmaps", "--num_samples", "1")
    names = {"samples.html", "heatmap_top_k_200_sample_1.png", "heatmap_top_k_200_sample_1.html"}
    assert {path.name for path in (folder / "charts").iterdir()} == names
    page = (folder / "charts" / "samples.html").read_text()
    assert re.findall("<h2>top_k 200, sample 1, (.*)</h2>", page) == ["softmax", "softmax_top_k", "minmax", "rank"]


def test_a_boundary_separates_tokens(sample):
    assert re.search(
        r"a\|b\|(.\|){19}.\n", sample("--start", "ab", "--token_boundary", "|", "--num_samples", "1"), re.DOTALL
    )


def test_scores_are_printed_and_written(sample, tmp_path, folder, datasets_cache):
    (tmp_path / "rows.json").write_text('{"text": "or"}\n{"text": "so"}')
    (tmp_path / "tiny.yaml").write_text(TASK.format(folder=tmp_path))
    printed = sample("--lm_eval_tasks", "tiny", "--lm_eval_include_path", str(tmp_path), "--print_model_info")
    found = json.loads((folder / "charts" / "lm_eval.json").read_text())
    value = found["results"]["tiny"]["acc,none"]
    assert found["rows"][0]["value"] == value
    assert re.search(rf"tiny .* acc .* {value:.4f}", printed)
    assert "NanoGPTForCausalLM" in printed


def test_a_nanogpt_checkpoint_takes_its_tokenizer_from_elsewhere(sample, folder, tmp_path, chars):
    (tmp_path / "old").mkdir()
    shape = {"vocab_size": len(chars), "block_size": 16, "n_layer": 1, "n_head": 2, "n_embd": 16}
    NanoGPTForCausalLM(NanoGPTConfig(
        **shape, use_rotary_embeddings=False, use_abs_pos_embeddings=True, norm_variant_attn="layernorm",
        norm_variant_output="layernorm", activation_variant="gelu",
    )).save_nanogpt(tmp_path / "old" / "ckpt.pt")  # fmt: skip
    printed = sample("--out_dir", str(tmp_path / "old"), "--tokenizer", str(folder), "--start", "a", "--top_k", "0")
    assert "all tokens, sample 3" in printed


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--temperature=-1"], "Error: --temperature -1.0 must be at least 0."),
        (["--temperature=nan"], "Error: --temperature nan must be at least 0."),
        (["--temperature=1e-42"], "overflows; 0 takes the likeliest token"),
        (["--device", "nope"], "Error: --device 'nope' is not on this machine."),
        (["--seed", str(2**70)], "must be at least 0 and below 2^63"),
        (["--out_dir", "/nowhere"], "Error: there is no folder '/nowhere'"),
        (["--start", "QQ"], "character 'Q'"),
        (["--block_size", "99"], "Error: --block-size 99 is more than the 16 tokens"),
        (["--start", "FILE:/nowhere.txt"], "cannot be read"),
    ],
)
def test_mistakes_are_told_in_one_line(folder, capsys, argv, message):
    with pytest.raises(SystemExit) as ended:
        main(["--out_dir", str(folder), *argv])
    assert ended.value.code == 1
    assert message in capsys.readouterr().err


def test_random_state_is_left_alone(sample):
    before = torch.random.get_rng_state()
    sample("--num_samples", "1")
    assert torch.equal(torch.random.get_rng_state(), before)
