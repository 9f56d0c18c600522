"""What happens around projecting: two callbacks, resumed fits, leftovers, weights that moved on, odd input."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_gradtools import GhostDotProdCallback, GradientStore, GradProjCallback, GradProjector
from hf_gradtools.core.checksums import StoreCorruptError
from hf_gradtools.core.store import StoreMismatchError
from tests.ghost.gradproj.reference_projection import error, expected_rows
from tests.ghost.reference import llama, rows


OPTIONS = {"proj_rank_total": 64, "dtype": "float32"}
DATA = rows(12)


def train(path, callbacks, model=None, data=DATA, resume=None, **args):
    arguments = TrainingArguments(
        str(path / "out"), per_device_train_batch_size=3, report_to="none", use_cpu=True, disable_tqdm=True,
        **{"max_steps": 4, "save_strategy": "no", "learning_rate": 1e-2, **args},
    )  # fmt: skip
    trainer = Trainer(model or llama(), arguments, train_dataset=data, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)


def stored(store):
    return store.rows(range(len(store)))


# ---- callbacks


@pytest.mark.parametrize("ghost_first", [True, False])
def test_dot_products_and_projections_in_one_run(ghost_first, tmp_path):
    named = DATA.add_column("sample_id", [f"doc-{i}" for i in range(12)])
    ghost = GhostDotProdCallback(rows(3, seed=9), output_dir=str(tmp_path / "ghost"), method="takeover")
    batches = GradProjCallback(output_dir=tmp_path / "rows", **OPTIONS)
    dataset = GradProjCallback(DATA, output_dir=tmp_path / "steps", steps=[2], **OPTIONS)
    callbacks = [ghost, batches, dataset] if ghost_first else [dataset, batches, ghost]
    train(tmp_path, callbacks, data=named, remove_unused_columns=False)
    assert list(batches.store.sample_ids) == list(ghost.dataset["sample_id"])
    assert set(batches.store.sample_ids) <= set(named["sample_id"])
    assert len(dataset.ensemble().stores[0]) == 12
    alone = GradProjCallback(output_dir=tmp_path / "alone", **OPTIONS)
    train(tmp_path, [alone], data=named, remove_unused_columns=False)
    assert error(stored(batches.store), stored(alone.store).double()) < 1e-4


@pytest.mark.parametrize("options", [{"rank": "auto"}, {"basis": "pca", "rank": 4}])
def test_a_resumed_run_keeps_the_fit_of_its_first_part(options, tmp_path):
    options = {**OPTIONS, **options}
    model = llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight *= 5
    train(tmp_path, [GradProjCallback(output_dir=tmp_path / "rows", **options)], model, max_steps=2,
          save_strategy="steps", save_steps=2)  # fmt: skip
    before = GradientStore.open(tmp_path / "rows").identity
    callback = GradProjCallback(output_dir=tmp_path / "rows", **options)
    train(tmp_path, [callback], model, max_steps=4, resume=str(tmp_path / "out" / "checkpoint-2"))
    assert callback.store.column("step").tolist() == [n for n in (1, 2, 3, 4) for _ in range(3)]
    assert callback.store.identity == before
    callback.store.verify()


def test_sets_of_rows_at_the_same_steps_search_each_other(tmp_path):
    sets = {"train": DATA, "target": rows(2, seed=4)}
    callback = GradProjCallback(sets, output_dir=tmp_path / "rows", steps=[1, 3, 9], **OPTIONS)
    train(tmp_path, [callback])
    found = callback.ensemble("train").search(callback.ensemble("target"), k=2)
    assert len(found) == 4
    with pytest.raises(ValueError, match=r"name=None is no dataset of this callback; it has \['train', 'target'\]"):
        callback.ensemble()
    again = GradProjCallback(sets, output_dir=tmp_path / "rows", steps=[1], **OPTIONS)
    with pytest.raises(ValueError, match="holds step-1 of an earlier run"):
        train(tmp_path, [again])


def test_steps_that_never_come_are_told(tmp_path, caplog):
    train(tmp_path, [GradProjCallback(DATA, output_dir=tmp_path / "rows", steps=7, **OPTIONS)])
    assert "training ended at step 4, before steps=[7]" in caplog.text
    with pytest.raises(ValueError, match="steps=0 must be numbers of optimizer steps"):
        GradProjCallback(DATA, output_dir=tmp_path, steps=0)


def test_a_sample_that_is_not_finite(tmp_path, caplog):
    class Exploding(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 1)

        def forward(self, x, labels):
            return {"loss": (self.inner(x)[:, 0] / labels).square().mean()}

    data = [{"x": torch.randn(3), "labels": torch.tensor(float(i != 2))} for i in range(5)]

    def collate(picked):
        return {name: torch.stack([row[name] for row in picked]) for name in ("x", "labels")}

    options = {"stages": 1, "rank": (None, None), "data_collator": collate}
    with pytest.raises(ValueError, match="sample_id=2 is not finite"):
        GradProjector(Exploding(), **options).project(data, output_dir=tmp_path / "a", batch_size=1)
    store = GradProjector(Exploding(), **options, on_nonfinite="skip").project(
        data, output_dir=tmp_path / "b", batch_size=1
    )
    assert "samples [2] are not finite" in caplog.text
    assert (stored(store)[2] == 0).all()


# ---- stores


def test_a_model_that_has_trained_on_does_not_query_its_old_store(tmp_path):
    model = llama()
    store = GradProjector(model, **OPTIONS).project(DATA, output_dir=tmp_path)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight += 0.1
    with pytest.raises(StoreMismatchError, match="the projector as it is now: weights"):
        store.search(DATA.select([1]), k=1)


def test_queries_before_the_corpus_do_not_spoil_a_pca_store(tmp_path):
    options = {**OPTIONS, "basis": "pca", "rank": 4}
    GradProjector(llama(), **options).project(DATA, output_dir=tmp_path)
    before = (tmp_path / "bases.safetensors").read_bytes()
    other = GradProjector(llama(), **options)
    other.gradients(rows(3, seed=8))  # fits on the queries
    with pytest.raises(StoreMismatchError, match="bases"):
        other.project(DATA, output_dir=tmp_path)
    assert (tmp_path / "bases.safetensors").read_bytes() == before
    GradientStore.open(tmp_path).bind(GradProjector(llama(), **options))


def test_another_collator_is_another_dataset(tmp_path):
    def halved(picked):
        from hf_gradtools.ghost.gradproj.batches import pad_rows

        return pad_rows([{k: v[:7] for k, v in row.items()} for row in picked])

    GradProjector(llama(), **OPTIONS).project(DATA, output_dir=tmp_path)
    with pytest.raises(StoreMismatchError, match="dataset.collated"):
        GradProjector(llama(), **OPTIONS).project(DATA, halved, tmp_path)


def test_leftover_shards_are_refused(tmp_path):
    store = GradProjector(llama(), **OPTIONS).project(DATA, output_dir=tmp_path / "a")
    (tmp_path / "a" / "manifest.json").rename(tmp_path / "kept")
    with pytest.raises(ValueError, match=r"shards of rows, such as .* but no manifest\.json"):
        GradProjector(llama(), **OPTIONS).project(DATA, output_dir=tmp_path / "a")
    with pytest.raises(ValueError, match="holds a store already"):
        store.save_pretrained(tmp_path / "a")
    (tmp_path / "kept").rename(tmp_path / "a" / "manifest.json")
    next((tmp_path / "a").glob("*.arrow")).unlink()
    with pytest.raises(StoreCorruptError, match=r"shard-00000-00000\.arrow: is missing"):
        GradientStore.open(tmp_path / "a")


# ---- models and rows


def test_collators_see_whole_rows_and_models_only_what_they_take():
    def by_prompt(picked):
        ids = torch.tensor([row["input_ids"][:9] for row in picked])
        labels = ids.clone()
        for row, label in zip(picked, labels, strict=True):
            label[: row["prompt_tokens"]] = -100
        return {"input_ids": ids, "labels": labels, "prompt_tokens": torch.tensor([0] * len(picked))}

    data = [{"input_ids": row["input_ids"], "prompt_tokens": 3, "note": "x"} for row in rows(4, length=(9, 9))]
    projector = GradProjector(llama(), **OPTIONS, rank=4, data_collator=by_prompt)
    mine = projector.gradients(data)
    plain = [{"input_ids": r["input_ids"], "labels": [-100] * 3 + r["input_ids"][3:]} for r in data]
    assert error(mine, expected_rows(projector, plain)) < 1e-5


def test_columns_that_an_adapted_model_takes_reach_it():
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    data = [{"input_ids": r["input_ids"], "labels": r["input_ids"]} for r in rows(3, length=(9, 9))]
    # Rotary positions only matter in their differences.
    stretched = [{**row, "position_ids": list(range(0, 27, 3))} for row in data]
    projector = GradProjector(model, **OPTIONS, rank=4)
    assert error(projector.gradients(stretched), projector.gradients(data).double()) > 1e-2


def test_subclasses_of_linear_are_linear():
    class OwnLinear(nn.Linear):
        def forward(self, x):
            return x @ self.weight.T + self.bias

    model = nn.Sequential(OwnLinear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    projector = GradProjector(model, stages=1, rank=(None, None), loss_fn=lambda m, b: m(b["x"]).square().mean())
    assert [layer.name for layer in projector.layers] == ["0", "2"]


def test_what_all_linear_leaves_out_is_told(caplog):
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.stacked, self.head = nn.Parameter(torch.randn(4, 5, 5)), nn.Linear(5, 2)

    GradProjector(Experts(), rank=2)
    assert "reaches 10 of 110 matrix weights" in caplog.text


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (DatasetDict({"train": DATA}), "a mapping of train; pass one split"),
        (DATA.to_iterable_dataset(), "without length or indices"),
        ([{"input_ids": [1, 2], "labels": None}], "column 'labels' holds"),
        ([{"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [1, 2]}], "column 'labels' holds"),
        ([{"input_ids": [1, 2], "labels": [1, 2], "sample_id": i} for i in (1, "a")], "numbers and strings"),
    ],
)
def test_rows_that_are_none(data, named, tmp_path):
    with pytest.raises(ValueError, match=named):
        GradProjector(llama(), **OPTIONS, rank=4).project(data, output_dir=tmp_path)


def test_a_bad_pattern_and_vectors_alone(tmp_path):
    with pytest.raises(ValueError, match=r"layers='\(' is no regular expression"):
        GradProjector(llama(), layers="(")
    store = GradProjector(llama(), layers=["norm"], **OPTIONS).project(DATA, output_dir=tmp_path)
    assert error(stored(store), expected_rows(store.projector, DATA)) < 1e-5


def test_rows_of_a_list_keep_their_ids(tmp_path):
    data = [{**row, "sample_id": f"r{i}"} for i, row in enumerate(DATA)]
    assert list(GradProjector(llama(), **OPTIONS).project(data, output_dir=tmp_path).sample_ids)[:2] == ["r0", "r1"]


def test_a_map_style_dataset_of_ones_own(tmp_path):
    class Endless(torch.utils.data.Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return DATA[index % 12]

    assert len(GradProjector(llama(), **OPTIONS).project(Endless(), output_dir=tmp_path)) == 4


def test_datasets_of_the_dataset_class_are_hashed_whole(tmp_path):
    data = Dataset.from_list([{"input_ids": [i % 60, 3, 4, 5], "labels": [i % 60, 3, 4, 5]} for i in range(300)])
    GradProjector(llama(), **OPTIONS, rank=3).project(data, output_dir=tmp_path)
    changed = data.map(lambda row, i: {"labels": [1, 1, 1, 1]} if i == 101 else row, with_indices=True)
    with pytest.raises(StoreMismatchError, match="dataset.content"):
        GradProjector(llama(), **OPTIONS, rank=3).project(changed, output_dir=tmp_path)


# ---- what a second review found


def test_a_kill_while_a_checkpoint_is_projected_is_repaired_on_resume(tmp_path, monkeypatch):
    sets = {"train": DATA, "target": rows(5, seed=4)}
    args = {"save_strategy": "steps", "save_steps": 2}

    def callback():
        return GradProjCallback(sets, output_dir=tmp_path / "rows", on_save=True, **OPTIONS)

    project = GradProjector.project
    calls = []

    def killed(self, *given, **options):
        calls.append(options["output_dir"])
        if len(calls) == 4:  # step-4/target
            raise KeyboardInterrupt
        return project(self, *given, **options)

    monkeypatch.setattr(GradProjector, "project", killed)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, [callback()], **args)
    monkeypatch.undo()
    (tmp_path / "rows" / "step-9").mkdir()  # of a run that had come further
    resumed = callback()
    train(tmp_path, [resumed], max_steps=6, resume=str(tmp_path / "out" / "checkpoint-4"), **args)
    assert sorted(folder.name for folder in (tmp_path / "rows").iterdir()) == ["step-2", "step-4", "step-6"]
    ensemble = resumed.ensemble("target")
    assert all(len(store) == 5 for store in ensemble.stores)
    rates = [store.extra["learning_rate"] for store in resumed.ensemble("train").stores]
    assert rates == [store.extra["learning_rate"] for store in ensemble.stores]


def test_rows_of_a_stream_have_the_samples_own_scale(tmp_path):
    from tests.ghost.gradproj.test_families import family

    model, data = family("classes")
    named = data.add_column("sample_id", list(range(8)))
    expected = GradProjector(model, **OPTIONS, rank=4, on_uncovered="ignore").gradients(data, batch_size=1)
    callback = GradProjCallback(output_dir=tmp_path / "rows", **OPTIONS, rank=4)
    train(tmp_path, [callback], model, named.to_iterable_dataset(), learning_rate=0.0, max_steps=1,
          gradient_accumulation_steps=2, remove_unused_columns=False)  # fmt: skip
    assert error(stored(callback.store), expected[callback.store.sample_ids].double()) < 1e-5


def test_each_callback_has_its_own_ids_and_leaves_the_loader_in_any_order(tmp_path):
    data = DATA.add_column("doc", [f"d{i}" for i in range(12)]).add_column("sample_id", [f"s{i}" for i in range(12)])
    one = GradProjCallback(output_dir=tmp_path / "one", **OPTIONS, rank=4)
    two = GradProjCallback(output_dir=tmp_path / "two", sample_id_column="doc", **OPTIONS, rank=4)
    train(tmp_path, [one, two], data=data, remove_unused_columns=False)
    assert [i[1:] for i in one.store.sample_ids] == [i[1:] for i in two.store.sample_ids]
    assert {i[0] for i in one.store.sample_ids} == {"s"}
    assert {i[0] for i in two.store.sample_ids} == {"d"}

    from torch.utils.data import DataLoader, default_collate

    from hf_gradtools.ghost.sample_ids import install_ids

    for first, second in ((0, 1), (1, 0)):
        rows_ = [{"x": 1}]
        loader = DataLoader(rows_, collate_fn=default_collate)
        undo = [install_ids(loader, key, "sample_id") for key in ("a", "b")]
        undo[first]()
        assert ({"a", "b"} & set(next(iter(loader)))) == {"ab"[second]}
        undo[second]()
        assert loader.dataset is rows_
        assert loader.collate_fn is default_collate


def test_a_collator_and_a_loss_share_a_column():
    def collate(picked):
        ids = torch.tensor([row["input_ids"] for row in picked])
        return {"input_ids": ids, "labels": ids, "weight": torch.ones(len(picked))}

    def weighted(model, batch):
        return model(input_ids=batch["input_ids"], labels=batch["labels"])["loss"] * batch["weight"].mean()

    data = [{"input_ids": row["input_ids"]} for row in rows(4, length=(9, 9))]
    assert GradProjector(llama(), **OPTIONS, rank=4, data_collator=collate, loss_fn=weighted).gradients(data).any()


def test_scores_that_overflow_are_told(tmp_path):
    projector = GradProjector(llama(), **OPTIONS, rank=4)
    store = projector.project(DATA, output_dir=tmp_path)
    with pytest.raises(ValueError, match="scores are not finite"):
        store.search(torch.full((1, 64), 3e38), k=12)


@pytest.mark.parametrize("dataset", [{}, {0: DATA}, {"a/b": DATA}])
def test_names_of_sets(dataset, tmp_path):
    with pytest.raises(ValueError, match="an empty mapping|names become folders"):
        GradProjCallback(dataset, output_dir=tmp_path, steps=[1])
