"""`hf-gradtools ghost project`, `search` and `info` on a tiny model: what they write, print and refuse."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from hf_gradtools.cli import app
from hf_gradtools.ghost.gradproj.run import logged_learning_rate
from hf_gradtools.ghost.gradproj.run_config import ProjectConfig, parse_rank
from hf_gradtools.ghost.gradproj.store import GradientStore


pytestmark = pytest.mark.usefixtures("datasets_cache")

LETTERS = "abcdefghij"
SMALL = ["--proj-rank-total", 64, "--rank", 8, "--batch-size", 4]


def run(*args):
    return CliRunner().invoke(app, ["ghost", *map(str, args)])


def refusal(result):
    assert result.exit_code == 1, result.output
    lines = [line for line in result.stderr.splitlines() if "Error" in line]
    assert len(lines) == 1, result.output
    return lines[0]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def question(i):
    return {"question": f"Question {LETTERS[i]} {LETTERS[-i]} {i % 10} ?", "answer": f"{'yes' if i % 2 else 'no'} {i}"}


def write_texts(path):
    rng = np.random.default_rng(0)
    return write_rows(path, [{"text": " ".join(rng.choice(list(LETTERS), 8))} for _ in range(9)])


@pytest.fixture
def texts(tmp_path):
    return write_texts(tmp_path / "texts.jsonl")


@pytest.fixture
def questions(tmp_path):
    return write_rows(tmp_path / "questions.jsonl", map(question, range(9)))


@pytest.fixture
def project(tiny_model, tmp_path):
    def project(dataset, *args, out=tmp_path / "out"):
        return run("project", "--model", tiny_model, "--dataset", dataset, "--output-dir", out, *SMALL, *args)

    return project


@pytest.fixture(scope="module")
def projected(tiny_model, tmp_path_factory):
    """Folder of a run, not to be written to."""
    folder = tmp_path_factory.mktemp("projected")
    shared = ["--model", tiny_model, "--dataset", write_texts(folder / "texts.jsonl"), "--output-dir", folder / "out"]
    assert run("project", *shared, *SMALL).exit_code == 0
    return folder / "out"


def make_checkpoint(path, tiny_model, step, rates, scale=1.0):
    """A checkpoint as Trainer leaves it, its weights scaled, with AdamW's state."""
    import torch
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.save_pretrained(path)
    trainer = Trainer(model, TrainingArguments(path, report_to="none", use_cpu=True))
    optimizer = trainer.create_optimizer()
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    torch.save(optimizer.state_dict(), path / "optimizer.pt")
    with torch.no_grad():
        model.lm_head.weight *= scale
    model.save_pretrained(path)
    logs = [{"step": n, "learning_rate": rate} for n, rate in rates.items()]
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step, "log_history": logs}))
    return path


def test_project_search_and_info(project, texts, tmp_path):
    result = project(texts)
    assert result.exit_code == 0, result.output
    assert "9 of" in result.stdout
    assert "64 float16 numbers each" in result.stdout
    assert "9 rows in" in result.stdout
    store = GradientStore.open(tmp_path / "out" / "gradients")
    assert (len(store), store.dim, store.complete) == (9, 64, True)
    row = json.loads(texts.read_text().splitlines()[4])["text"]
    found = run("search", tmp_path / "out", "--query", row, "-k", 3)
    assert found.exit_code == 0, found.output
    assert found.stdout.splitlines()[2].split()[:2] == ["+1", "4"]  # itself, of cosine 1
    assert row in (tmp_path / "out" / "search.html").read_text()
    assert "Shares of layers" in (tmp_path / "out" / "search.html").read_text()
    info = run("info", tmp_path / "out", "--verify").stdout
    assert "proj_rank_total   64" in info
    assert "9 rows are as written" in info


def test_a_run_that_was_killed_goes_on(project, texts, tmp_path, monkeypatch):
    def interrupt(self):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("hf_gradtools.ghost.gradproj.store.GradientWriter.finish", interrupt)
        assert "The same command continues it" in project(texts).output
    assert "Not all rows are there yet: gradients" in run("search", tmp_path / "out", "--query", "a b").output
    assert project(texts).exit_code == 0
    assert "nothing: all rows were there" in project(texts).stdout
    assert project(texts, out=tmp_path / "whole").exit_code == 0
    resumed, whole = (GradientStore.open(tmp_path / name / "gradients") for name in ("out", "whole"))
    assert resumed.to_dataset().to_dict() == whole.to_dataset().to_dict()


def test_prompts_and_responses(project, questions, tmp_path):
    assert "responses in answer" in project(questions).stdout
    asked = ["--query", question(3)["question"], "--query-response", question(3)["answer"]]
    assert run("search", tmp_path / "out", *asked).stdout.splitlines()[2].split()[:2] == ["+1", "3"]
    rows = write_rows(tmp_path / "queries.jsonl", [question(2), question(7)])
    found = run("search", tmp_path / "out", "--query-dataset", rows, "-k", 1).stdout
    assert [line.split()[1] for line in found.splitlines() if line.strip().startswith("+1 ")] == ["2", "7"]
    assert run("search", tmp_path / "out", "--query", "a b c").exit_code == 0  # plain text, all of which counts


@pytest.mark.parametrize("how", [["--reduce", "max"], ["--reduce", "mean"], ["--precondition", "fisher"]])
def test_ways_to_search(projected, tmp_path, how):
    found = run(
        "search",
        projected,
        "--html",
        tmp_path / "found.html",
        "--query",
        "a b c",
        "--query",
        "d e",
        "-k",
        2,
        "--metric",
        "dot",
        *how,
    )
    assert found.exit_code == 0, found.output
    assert found.stdout.count("+") == (2 if "--reduce" in how else 4)


def test_checkpoints_get_a_store_each_and_are_searched_together(project, texts, tiny_model, tmp_path):
    late = make_checkpoint(tmp_path / "checkpoint-20", tiny_model, 20, {10: 3e-3, 20: 1e-3}, scale=1.5)
    early = make_checkpoint(tmp_path / "checkpoint-10", tiny_model, 10, {10: 3e-3})
    result = project(texts, "--checkpoint", late, "--checkpoint", early)
    assert result.exit_code == 0, result.output
    stores = [GradientStore.open(tmp_path / "out" / f"checkpoint-{step}") for step in (10, 20)]
    assert [store.extra["learning_rate"] for store in stores] == [3e-3, 1e-3]
    assert stores[0].identity["weights"] != stores[1].identity["weights"]
    row = json.loads(texts.read_text().splitlines()[5])["text"]
    for how in ([], ["--precondition", "adam"]):
        found = run("search", tmp_path / "out", "--query", row, "-k", 3, *how)
        assert found.exit_code == 0, found.output
        assert how or found.stdout.splitlines()[2].split()[:2] == ["+1", "5"]
    assert "checkpoint-10 0.750, checkpoint-20 0.250" in (tmp_path / "out" / "search.html").read_text()
    assert str(tmp_path) not in (tmp_path / "out" / "checkpoint-10" / "manifest.json").read_text()
    late.rename(tmp_path / "elsewhere")
    assert "is not where checkpoints.json says" in refusal(run("search", tmp_path / "out", "--query", row))


def test_checkpoints_without_learning_rates_count_equally(project, texts, tiny_model, tmp_path):
    folders = [make_checkpoint(tmp_path / f"checkpoint-{step}", tiny_model, step, {}, step) for step in (1, 2)]
    result = project(texts, "--checkpoint", folders[0], "--checkpoint", folders[1])
    assert "no learning rate was logged up to checkpoint-1, checkpoint-2" in result.stdout
    assert run("search", tmp_path / "out", "--query", "a b").exit_code == 0
    assert "checkpoint-1 0.500, checkpoint-2 0.500 (equal" in (tmp_path / "out" / "search.html").read_text()


def test_a_dataset_that_is_gone_costs_the_shares_only(project, texts, tmp_path):
    project(texts)
    kept = texts.read_text()
    texts.unlink()
    found = run("search", tmp_path / "out", "--query", "a b c")
    assert found.exit_code == 0, found.output
    assert "No shares of layers: there is no file" in found.stderr
    assert "No shares of layers." in (tmp_path / "out" / "search.html").read_text()
    texts.write_text(kept.replace("a", "b"))
    assert "other rows than when it was projected" in run("search", tmp_path / "out", "--query", "a b").stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--rank", "many"], "--rank 'many' is none of auto"),
        (["--stages", 3], "--stages 3 is unknown"),
        (["--basis", "fourier"], "--basis 'fourier' is unknown"),
        (["--store-dtype", "int8"], "--store-dtype 'int8' is unknown"),
        (["--layers", "conv"], "--layers"),
        (["--text-column", "body"], "--text-column 'body' is no column of it"),
        (["--checkpoint", "nowhere"], "--checkpoint 'nowhere' has no trainer_state.json"),
        (["--model", "nowhere/nothing"], "--model 'nowhere/nothing' cannot be loaded"),
        (["--proj-rank-total", 0], "--proj-rank-total 0 must be at least 1"),
    ],
)
def test_mistakes_of_project_are_told_in_one_line_and_leave_nothing(project, texts, tmp_path, args, message):
    assert message in refusal(project(texts, *args))
    assert not (tmp_path / "out").exists()


def test_other_options_are_refused_in_the_folder_of_a_run(project, projected):
    again = project(projected.parent / "texts.jsonl", "--seed", 1, out=projected)
    assert "--seed 0, not 1" in refusal(again)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "pass either --query"),
        (["--query", "a b", "--query", " "], "query number 2 has nothing that the loss counts"),
        (["--query", "a b", "--metric", "l2"], "--metric 'l2' is unknown"),
        (["--query", "a b", "--query-response", "c"], "--query-response 'c' has no use"),
        (["--query", "a b", "--precondition", "adam"], "needs Adam's second moments: pass --optimizer-state"),
        (["--query", "a b", "--optimizer-state", "x"], "only read with --precondition 'adam'"),
        (["--query", "a b", "--top-k", 0], "--top-k 0 must be at least 1"),
    ],
)
def test_mistakes_of_search_are_told_in_one_line(projected, args, message):
    assert message in refusal(run("search", projected, *args))


def test_another_model_is_refused(projected, tiny_model, tmp_path):
    other = make_checkpoint(tmp_path / "other", tiny_model, 1, {}, scale=2.0)
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(other)
    assert "weights" in refusal(run("search", projected, "--query", "a b", "--model", other))


def test_damage_and_empty_folders_are_told(project, texts, tmp_path):
    assert "holds no gradients" in refusal(run("info", tmp_path))
    assert "holds no run" in refusal(run("search", tmp_path, "--query", "a b"))
    project(texts)
    (shard,) = (tmp_path / "out" / "gradients").glob("shard-*.arrow")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert "is damaged" in refusal(run("info", tmp_path / "out", "--verify"))


def test_ranks_are_read():
    ranks = {None: None, "auto": "auto", "64": (64, 64), "8,16": (8, 16), "full,16": (None, 16), "full": (None, None)}
    assert {text: parse_rank(text) for text in ranks} == ranks
    config = ProjectConfig("m", "d", "o", stages=1, rank="full", layers=["all"]).projection()
    assert (config.rank, config.layers) == ((None, None), None)


def test_learning_rates_are_means_since_the_checkpoint_before(tmp_path):
    logs = [{"step": step, "learning_rate": rate} for step, rate in ((1, 4.0), (2, 2.0), (3, 1.0))] + [{"step": 3}]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 3, "log_history": logs}))
    assert logged_learning_rate(tmp_path) == 7 / 3
    assert logged_learning_rate(tmp_path, since=1) == 1.5
    assert logged_learning_rate(tmp_path, since=3) == 1.0
