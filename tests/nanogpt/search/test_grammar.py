"""The exploration grammar: what each form expands to, and what is refused."""

import json
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_gradtools.nanogpt.search.exploration import read_exploration
from hf_gradtools.nanogpt.search.grammar import expand_document
from hf_gradtools.nanogpt.search.reading import GrammarError, config_key, read_documents
from hf_gradtools.nanogpt.search.specs import expand_range


def configs(document):
    return [combination.config for combination in expand_document(document, "sweep.yaml, document 1")]


def explore(tmp_path, text, name="sweep.yaml", **options):
    path = tmp_path / name
    path.write_text(text)
    return read_exploration(path, **options)


def test_lists_are_axes_and_scalars_constants_the_last_turning_fastest():
    assert configs({"n_layer": [2, 4], "dataset": "d", "lr": [0.1, 0.2]}) == [
        {"n_layer": layers, "dataset": "d", "lr": lr} for layers in (2, 4) for lr in (0.1, 0.2)
    ]


def test_list_valued_arguments_stay_whole():
    variants = [["causal", "ssm"], ["causal"]]
    assert configs({"attention_variant": variants}) == [{"attention_variant": value} for value in variants]
    assert configs({"common_group": {"attention_variant": [["causal", "ssm"]]}, "n_layer": 2}) == [
        {"attention_variant": ["causal", "ssm"], "n_layer": 2}
    ]


@pytest.mark.parametrize(
    ("numbers", "values"),
    [
        ((1, 12), list(range(1, 13))),
        ((0.1, 0.5, 0.1), [0.1, 0.2, 0.3, 0.4, 0.5]),
        ((0.1, 0.7, 0.1), [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]),
        ((4, 1, -1), [4, 3, 2, 1]),
        ((0.3, 0.1), [0.3, 0.2, 0.1]),
        ((1, 10, 4), [1, 5, 9]),
        ((0, 1, 0.4), [0.0, 0.4, 0.8]),
        ((2, 2), [2]),
        ((1e-4, 3e-4, 1e-4), [1e-4, 2e-4, 3e-4]),
    ],
)
def test_ranges_include_their_end_without_accumulated_error(numbers, values):
    expanded = expand_range(*numbers)
    assert expanded == values
    assert [type(value) for value in expanded] == [type(value) for value in values]


@given(st.integers(-500, 500), st.integers(1, 50), st.integers(0, 60), st.sampled_from([1, 10, 1000]), st.booleans())
def test_every_value_of_a_range_is_the_nearest_float_to_start_plus_a_multiple_of_the_step(
    start, step, count, scale, down
):
    step = -step if down else step
    exact = [Fraction(start + index * step, scale) for index in range(count + 1)]
    expanded = expand_range(start / scale, float(exact[-1]), step / scale)
    assert expanded == [float(value) for value in exact]


def test_conditions_add_options_only_where_they_hold():
    document = {
        "softmax": ["softmax", "consmax"],
        "base": {"conditions": {"softmax": "consmax"}, "options": [2, 10]},
        "gamma": {"conditions": [["base", 10]], "options": {"range": {"start": 1, "end": 2}}},
    }
    assert configs(document) == [
        {"softmax": "softmax"},
        {"softmax": "consmax", "base": 2},
        {"softmax": "consmax", "base": 10, "gamma": 1},
        {"softmax": "consmax", "base": 10, "gamma": 2},
    ]


def test_conditions_may_name_parameters_that_are_written_after_them():
    document = {
        "c": {"conditions": {"b": 5}, "options": [7]},
        "b": {"conditions": [{"a": 1}, {"x": 2}], "options": [5]},
        "a": {"conditions": {"x": 1}, "options": [1]},
        "x": [1, 2],
    }
    assert configs(document) == [{"x": 1, "a": 1, "b": 5, "c": 7}, {"x": 2, "b": 5, "c": 7}]
    with pytest.raises(GrammarError, match="a: the conditions of a, b depend on each other in a ring"):
        configs({"a": {"conditions": {"b": 1}, "options": 1}, "b": {"conditions": {"a": 1}, "options": 1}})
    with pytest.raises(GrammarError, match="the conditions of a depend"):
        configs({"a": {"conditions": {"a": 1}, "options": 1}})


def test_of_several_conditions_one_must_hold_and_common_values_count():
    document = {
        "common_group": {"mlp": "kan"},
        "a": [1, 2, 3],
        "b": {"conditions": [{"a": 1, "mlp": "kan"}, {"a": 3}], "options": "x"},
    }
    assert configs(document) == [
        {"mlp": "kan", "a": 1, "b": "x"},
        {"mlp": "kan", "a": 2},
        {"mlp": "kan", "a": 3, "b": "x"},
    ]


def test_a_condition_tells_true_from_one():
    document = {"a": [True, 1], "b": {"conditions": {"a": 1}, "options": [5]}}
    assert configs(document) == [{"a": True}, {"a": 1, "b": 5}]


def test_parameter_groups_vary_together_and_nest():
    document = {
        "n_layer": [1, 2],
        "parameter_groups": [
            {"rotary": True, "abs": False},
            {"rotary": False, "parameter_groups": [{"abs": True}, {"abs": False, "fire": [True]}]},
        ],
    }
    groups = [
        {"rotary": True, "abs": False},
        {"rotary": False, "abs": True},
        {"rotary": False, "abs": False, "fire": True},
    ]
    assert configs(document) == [{"n_layer": layers, **group} for group in groups for layers in (1, 2)]


NAMED = """
named_static_groups:
  - named_group: rotary
    use_rotary_embeddings: [true]
    use_abs_pos_embeddings: [false]
  - named_group: mqa
    named_group_settings: {n_kv_group: 1}
  - named_group: small
    n_head: [2]
  - named_group: large
    n_head: [8]
named_variation_groups:
  - named_group: sizes
    named_group_alternates: [small, large]
    block_size: [32, 64]
common_group:
  dataset: [shakespeare_char]
parameter_groups:
  - named_group_static: [rotary, mqa]
    named_group_variations: [sizes]
    n_layer: {range: {start: 1, end: 2}}
  - named_group_alternates: [small, large]
"""


def test_named_groups_are_merged_and_abbreviated_in_names(tmp_path):
    runs = explore(tmp_path, NAMED, prefix="p-")
    rotary = {"use_rotary_embeddings": True, "use_abs_pos_embeddings": False, "n_kv_group": 1}
    expected = [
        {"dataset": "shakespeare_char", "n_layer": layers, **rotary, "block_size": block, "n_head": heads}
        for heads in (2, 8)
        for layers in (1, 2)
        for block in (32, 64)
    ] + [{"dataset": "shakespeare_char", "n_head": heads} for heads in (2, 8)]
    assert [run.config for run in runs] == expected
    assert [runs[0].name, runs[-1].name] == ["p-sweep-rotary-mqa-small-1-32", "p-sweep-large"]
    spelled = explore(tmp_path, NAMED, include_common_group_in_name=True, expand_named_groups_in_names=True)
    assert spelled[-1].name == "sweep-shakespeare_char-8"


def test_groups_of_a_library_are_those_of_the_document(tmp_path):
    definitions, rest = NAMED.split("common_group:")
    (tmp_path / "library.yaml").write_text(definitions)
    runs = explore(tmp_path, f"named_group_libraries: [library.yaml]\ncommon_group:{rest}")
    assert [run.config for run in runs] == [run.config for run in explore(tmp_path, NAMED)]


def test_documents_add_up_in_yaml_and_in_json(tmp_path):
    documents = [{"n_layer": [1, 2]}, {"n_layer": 3, "lr": 0.5}]
    expected = [{"n_layer": 1}, {"n_layer": 2}, {"n_layer": 3, "lr": 0.5}]
    for name, text in {
        "sweep.yaml": "---\nn_layer: [1, 2]\n---\n---\nn_layer: 3\nlr: 0.5\n",
        "list.yaml": "- n_layer: [1, 2]\n- {n_layer: 3, lr: 5e-1}\n",
        "sweep.json": json.dumps(documents),
    }.items():
        assert [run.config for run in explore(tmp_path, text, name)] == expected
    assert explore(tmp_path, json.dumps(documents[1]), "one", format="json")[0].config == expected[2]


def test_runs_asked_for_twice_run_once_and_are_named(tmp_path, caplog):
    runs = explore(tmp_path, "a: [1, 2, 1]\nb: 0\n---\nb: 0\na: 2\n")
    assert [run.config for run in runs] == [{"a": 1, "b": 0}, {"a": 2, "b": 0}]
    assert len({run.key for run in runs}) == 2
    assert "asks 2 times" in caplog.text
    assert "sweep-1-0, sweep-2-0" in caplog.text


def test_runs_that_differ_only_in_what_names_leave_out_have_names_of_their_own(tmp_path):
    runs = explore(tmp_path, "common_group: {a: 1}\nb: 0\n---\ncommon_group: {a: 2}\nb: 0\n")
    assert len({run.name for run in runs}) == 2


def test_the_name_of_a_run_can_be_a_value(tmp_path):
    (run,) = explore(tmp_path, "n_layer: 2\ntag: logs/${RUN_NAME}.csv\n")
    assert (run.name, run.flags()) == ("sweep-2", {"n_layer": 2, "tag": "logs/sweep-2.csv"})


def test_keys_of_configurations_ignore_order_and_tell_values_apart():
    assert config_key({"a": 1, "b": [2]}) == config_key({"b": [2], "a": 1})
    assert len({config_key({"a": value}) for value in (1, True, "1", 1.5, None, [1])}) == 6


def test_numbers_in_scientific_notation_are_numbers(tmp_path):
    (run,) = explore(tmp_path, "a: 1e-3\nb: 3E8\nc: 1.5e-4\nd: -2e5\ne: e5\n")
    assert run.config == {"a": 0.001, "b": 3e8, "c": 1.5e-4, "d": -2e5, "e": "e5"}


def test_yaml_merge_keys_may_be_overridden(tmp_path):
    text = "parameter_groups:\n- &base {a: 1, b: 2}\n- {<<: *base, b: 3}\n"
    assert [run.config for run in explore(tmp_path, text)] == [{"a": 1, "b": 2}, {"a": 1, "b": 3}]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: []", "document 1: a is an empty list"),
        ("a: {rnge: 1}", "document 1: a is a mapping with the keys 'rnge'"),
        ("a: {range: {start: 1, end: 2, stp: 1}}", "a.range has the unknown keys 'stp'"),
        ("a: {range: {start: 1}}", "a.range lacks 'end'"),
        ("a: {range: {start: '1', end: 2}}", "a.range.start is '1'"),
        ("a: {range: {start: 1, end: 2, step: 0}}", "step is 0"),
        ("a: {range: {start: 1, end: 2, step: -1}}", "leads away from end"),
        ("a: {range: {start: 0, end: 1, step: 1e-9}}", "more than 100,000 values from 0 to 1"),
        ("a: {range: {start: 0, end: 1e300, step: 1e-300}}", "more than 100,000 values"),
        ("a: {conditions: {b: 1}}", "a has the keys 'conditions'"),
        ("a: {conditions: {b: 1}, options: 2, more: 3}", "it needs 'conditions' and 'options'"),
        ("a: {conditions: {b: 1}, options: []}\nb: 1", "a.options is an empty list"),
        ("a: {conditions: {}, options: [1]}", "a.conditions is empty"),
        ("a: {conditions: [[b, 1], [b, 2]], options: [1]}\nb: [1, 2]", "wants 'b' to be 1 and 2 at once"),
        ("a: {conditions: {b: 3}, options: [1]}\nb: [1, 2]", "document 1: a: its conditions b=3 never hold"),
        ("a: {conditions: {c: 3}, options: [1]}\nb: 1", "No run sets c"),
        ("a: {conditions: {b: [1, 2]}, options: [1]}\nb: [1, 2]", "A list is one value here"),
        ("a: 1\n---\na: 2\nparameter_group: [{b: 1}]", "document 2: 'parameter_group' is no key of the grammar"),
        ("named_things: 1", "'named_things' is no key of the grammar"),
        ("a: 1\nparameter_groups: [{a: 2}]", "a is given twice"),
        ("a: 1\nparameter_groups: []", "parameter_groups is empty"),
        ("parameter_groups: [{named_group_static: x}]", "names 'x'; the groups are none"),
        ("common_group: {a: [1, 2]}", "a common parameter has one value"),
        ("common_group: {a: 1}\na: 2", "a is 1 in common_group and 2 elsewhere"),
        ("a: [{b: 1}]", "under 'parameter_groups'"),
        ("a: 2020-01-01", "Put it into quotes"),
        ("a: 1\na: 2", "'a' is there twice"),
        ("1: 2", "the key 1 is a int"),
        ("- 3", "document 1 is 3"),
        ("", "holds no document"),
        ("a: [1", "sweep.yaml"),
        ("a: {range: {start: 1, end: 90000}}\nb: [1, 2]", "180,000 runs"),
        ("parameter_groups: [{common_group: {a: 1}}]", "belongs to the top"),
        ("named_static_groups: [{a: 1}]\nb: 1", "needs a 'named_group'"),
        ("named_static_groups: [{named_group: g, a: [1, 2]}]\nnamed_group_static: g", "'g' has several values"),
        ("named_variation_groups: [{named_group: g, named_group_variations: g}]\nnamed_group_variations: g", "g > g"),
        ("named_group_libraries: none.yaml", "there is no file"),
    ],
)
def test_what_has_no_meaning_is_refused_by_file_document_and_key(tmp_path, text, told):
    with pytest.raises(GrammarError, match="sweep.yaml") as refused:
        explore(tmp_path, text)
    assert told in str(refused.value)


def test_files_of_other_editors_are_read_or_refused_by_name(tmp_path):
    (tmp_path / "x.yaml").write_text("a: 1", encoding="utf-8-sig")
    assert read_documents(tmp_path / "x.yaml") == [{"a": 1}]
    (tmp_path / "x.yaml").write_text("a: 1", encoding="utf-16")
    with pytest.raises(GrammarError, match="x.yaml: .*codec can't decode"):
        read_documents(tmp_path / "x.yaml")


def test_a_key_twice_in_json_is_refused(tmp_path):
    (tmp_path / "x.json").write_text('{"a": 1, "a": 2}')
    with pytest.raises(GrammarError, match="there twice"):
        read_documents(tmp_path / "x.json")
