"""Per-sample values against plain recomputation with pandas."""

import builtins

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from datasets import Dataset, Features, List, Value

from hf_gradtools.ghost.results import ghost_values, merge_duplicate_rows, validation_set_names


COLUMNS = ("value", "dot_product")


def make_frame(num_samples=13, steps=20, batch=4, seed=0, sets=("",)):
    rng = np.random.default_rng(seed)
    ids = np.concatenate([rng.permutation(num_samples)[:batch] for _ in range(steps)])
    frame = pd.DataFrame({"step": np.repeat(np.arange(1, steps + 1), batch), "sample_id": ids, "segment": 0})
    frame["sample_loss"], frame["grad_norm"] = rng.normal(2, 1, (2, len(frame))).astype("float32")
    for column in [f"{column}{suffix}" for suffix in sets for column in COLUMNS]:
        frame[column] = rng.normal(size=len(frame)).astype("float32")
    return frame


def as_dataset(frame):
    return Dataset.from_pandas(frame, preserve_index=False)


def expected_values(frame, suffix=""):
    return frame.groupby("sample_id").agg(
        value=(f"value{suffix}", "sum"),
        times_seen=("step", "nunique"),
        dot_product=(f"dot_product{suffix}", "mean"),
        first_loss=("sample_loss", "first"),
        sample_loss=("sample_loss", "mean"),
        grad_norm=("grad_norm", "mean"),
    )


@pytest.mark.parametrize("hold", [as_dataset, pa.Table.from_pandas, lambda frame: frame.to_dict("records")])
def test_values_equal_a_pandas_groupby(hold):
    frame = make_frame()
    table = ghost_values(hold(frame)).to_pandas().set_index("sample_id").sort_index()
    pd.testing.assert_frame_equal(table, expected_values(frame), check_dtype=False, rtol=1e-5)


def test_rows_out_of_step_order_and_an_index_mapping_change_nothing():
    frame = make_frame()
    shuffled = as_dataset(frame).shuffle(seed=1)
    table = ghost_values(shuffled).to_pandas().set_index("sample_id").sort_index()
    pd.testing.assert_frame_equal(table, expected_values(frame), check_dtype=False, rtol=1e-5)


def test_columns_that_the_run_did_not_record_are_none():
    values = ghost_values(as_dataset(make_frame().drop(columns=["sample_loss", "grad_norm"])))
    assert values.first_loss is values.sample_loss is values.grad_norm is None
    assert set(values.most_helpful(1)[0]) == {"sample_id", "value", "times_seen", "dot_product"}


def test_most_helpful_has_the_lowest_values_and_most_harmful_the_highest():
    frame = make_frame()
    values = ghost_values(as_dataset(frame))
    ranked = expected_values(frame)["value"].sort_values().index.tolist()
    assert [sample["sample_id"] for sample in values.most_helpful(3)] == ranked[:3]
    assert [sample["sample_id"] for sample in values.most_harmful(100)] == ranked[::-1]
    assert len(values) == len(ranked)
    with pytest.raises(ValueError, match="k=0"):
        values.most_helpful(0)


def test_each_validation_set_has_its_values():
    frame = make_frame(sets=("/a", "/b/c"))
    rows = as_dataset(frame)
    assert validation_set_names(rows) == ["a", "b/c"]
    table = ghost_values(rows, "b/c").to_pandas().set_index("sample_id").sort_index()
    pd.testing.assert_frame_equal(table, expected_values(frame, "/b/c"), check_dtype=False, rtol=1e-5)
    with pytest.raises(ValueError, match=r"2 validation sets.*\['a', 'b/c'\]"):
        ghost_values(rows)


def test_a_single_set_is_called_validation_and_others_are_refused_by_name():
    rows = as_dataset(make_frame())
    assert validation_set_names(rows) == ["validation"]
    assert ghost_values(rows, "validation").val == "validation"
    with pytest.raises(ValueError, match=r"val='news'.*\['validation'\]"):
        ghost_values(rows, "news")


def test_string_ids_stay_strings():
    frame = make_frame()
    frame["sample_id"] = "doc-" + frame["sample_id"].astype(str)
    best = ghost_values(as_dataset(frame)).most_helpful(1)[0]["sample_id"]
    assert best == expected_values(frame)["value"].idxmin()


def test_rows_that_are_not_finite_add_nothing_and_are_announced():
    frame = make_frame()
    frame.loc[frame["sample_id"] == 3, "value"] = np.nan
    frame.loc[frame["step"] == 5, "value"] = np.inf
    finite = frame[np.isfinite(frame["value"])].groupby("sample_id")["value"].sum()
    with pytest.warns(UserWarning, match=f"{(~np.isfinite(frame['value'])).sum()} rows have no finite 'value'"):
        values = ghost_values(as_dataset(frame))
    table = values.to_pandas().set_index("sample_id")["value"]
    assert np.isnan(table[3])
    pd.testing.assert_series_equal(table.drop(3).sort_index(), finite, rtol=1e-5, check_dtype=False)
    assert 3 not in [sample["sample_id"] for sample in values.most_harmful(100)]


@pytest.mark.parametrize("rows", [Dataset.from_dict({}), as_dataset(make_frame().iloc[:0]), []])
def test_no_rows_is_an_error_that_says_so(rows):
    with pytest.raises(ValueError, match="0 rows"):
        ghost_values(rows)


def test_rows_of_something_else_are_refused():
    with pytest.raises(ValueError, match=r"dot_product.*not \['step', 'text'\]"):
        ghost_values(Dataset.from_dict({"step": [1], "text": ["a"]}))


def test_plot_writes_an_image_and_names_the_extra_without_matplotlib(tmp_path, monkeypatch):
    values = ghost_values(as_dataset(make_frame()))
    assert values.plot(tmp_path / "values.png").read_bytes().startswith(b"\x89PNG")
    real_import = builtins.__import__

    def without_matplotlib(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_matplotlib)
    with pytest.raises(ImportError, match=r"hf_gradtools\[viz\]"):
        values.plot(tmp_path / "values.png")


def with_duplicates():
    """60 rows, of which some share (step, sample_id) with an earlier one, and 3 numbers per row for layers."""
    rng = np.random.default_rng(0)
    frame = make_frame(num_samples=20, steps=15)
    twins = frame.iloc[[0, 0, 7, 30, 59]].assign(value=1.0, dot_product=2.0, grad_norm=9.0)
    frame = pd.concat([frame, twins]).sample(frac=1, random_state=0).reset_index(drop=True)
    frame["layer_dot_products"] = rng.normal(size=(len(frame), 3)).astype("float32").tolist()
    features = Features({column: Value("float32") for column in frame})
    features |= {column: Value("int64") for column in ("step", "sample_id", "segment")}
    features["layer_dot_products"] = List(Value("float32"), length=3)
    return frame, Dataset.from_pandas(frame, preserve_index=False, features=Features(features))


def test_duplicates_are_merged_by_summing_what_adds_up():
    frame, dataset = with_duplicates()
    merged = merge_duplicate_rows(dataset)
    wanted = {}
    for row in frame.to_dict("records"):
        first = wanted.setdefault((row["step"], row["sample_id"]), row)
        if first is not row:
            first["value"] += row["value"]
            first["dot_product"] += row["dot_product"]
            first["layer_dot_products"] = np.add(first["layer_dot_products"], row["layer_dot_products"])
    assert len(merged) == len(wanted) == 60
    assert merged.features == dataset.features
    for row, want in zip(merged, wanted.values(), strict=True):
        assert list(row) == list(want)
        for column in want:
            np.testing.assert_allclose(row[column], want[column], rtol=1e-5, err_msg=column)


def test_merging_keeps_segments_apart_and_values_unchanged():
    _, dataset = with_duplicates()
    packed = dataset.remove_columns("segment").add_column("segment", list(range(len(dataset))))
    assert merge_duplicate_rows(packed) is packed
    before, after = ghost_values(dataset).to_pandas(), ghost_values(merge_duplicate_rows(dataset)).to_pandas()
    columns = ["sample_id", "value", "times_seen"]
    pd.testing.assert_frame_equal(
        before[columns].sort_values("sample_id", ignore_index=True),
        after[columns].sort_values("sample_id", ignore_index=True),
        rtol=1e-5,
    )


def test_without_duplicates_the_same_object_comes_back():
    dataset = as_dataset(make_frame())
    assert merge_duplicate_rows(dataset) is dataset
    assert merge_duplicate_rows(empty := Dataset.from_dict({})) is empty


def test_duplicates_are_found_by_string_ids_too():
    dataset = Dataset.from_dict({"step": [1, 1, 2, 1], "sample_id": list("abaa"), "value": [1.0, 2.0, 4.0, 8.0]})
    assert merge_duplicate_rows(dataset).to_dict() == {
        "step": [1, 1, 2],
        "sample_id": ["a", "b", "a"],
        "value": [9.0, 2.0, 4.0],
    }
