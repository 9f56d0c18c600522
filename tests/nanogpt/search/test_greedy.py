"""The greedy search makes the reference choices, over any storage and number of workers, killed or not."""

import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from hf_gradtools.nanogpt.search.candidates import candidates
from hf_gradtools.nanogpt.search.choosing import Measured, choose, compare
from hf_gradtools.nanogpt.search.greedy import SearchSettings, greedy_search
from hf_gradtools.nanogpt.search.plots import accepted_path, plot_search
from hf_gradtools.nanogpt.search.pool import Pool
from hf_gradtools.nanogpt.search.run_queue import RunQueue
from tests.nanogpt.search.killed_search import BASELINE, SETTINGS, search
from tests.nanogpt.search.stub_runs import notes, stub, surface, troubled


STEPS = {"n_embd": 4, "n_head": 1, "mlp_size": 8}


def chosen(log):
    return [
        entry["chosen"] and (entry["chosen"]["param"], entry["chosen"]["value"]) for entry in log["iterations"][1:]
    ]


def reference(config, steps, multiples, rounds, run):
    """The search by hand: all candidates of a round in a list, judged by the three rules of the issue."""

    def measure(candidate):
        try:
            metrics = run({**candidate, "seed": 1337})
        except ValueError:
            return None
        return math.exp(-metrics["best_val_loss"]), metrics["num_params"]

    path = []
    for _ in range(rounds):
        score, cost = measure(config)
        dominating, paying = [], []
        for name, step in steps.items():
            for change in [sign * step * m for sign in (1, -1) for m in range(1, multiples + 1)]:
                elements = range(len(config[name])) if isinstance(config[name], list) else [None]
                for index in elements:
                    changed = {**config, name: list(config[name]) if index is not None else config[name] + change}
                    if index is not None:
                        changed[name][index] += change
                    if (found := measure(changed)) is None:
                        continue
                    gain, price = found[0] - score, found[1] - cost
                    label = (
                        name if index is None else f"{name}[{index}]",
                        changed[name] if index is None else changed[name][index],
                    )
                    if price <= 0 <= gain and (price < 0 or gain > 0):
                        dominating.append((gain, -price, label, changed))
                    elif gain > 0:
                        paying.append((gain / price, 0, label, changed))
        best = max(dominating or paying, key=lambda each: each[:2], default=None)
        path.append(best and best[2])
        if best is None:
            break
        config = best[3]
    return path


def quiet_surface(tmp_path):
    folder = tmp_path / "reference" / "runs" / "x"
    folder.mkdir(parents=True)
    return lambda flags: surface(flags, folder)


def test_choices_are_those_of_the_reference(tmp_path):
    log = search(tmp_path, rounds=8)
    assert chosen(log) == reference(BASELINE, STEPS, 2, 8, quiet_surface(tmp_path))
    rules = {entry["chosen"]["rule"].split(",")[0] for entry in log["iterations"][1:] if entry["chosen"]}
    assert rules == {"better or as good", "best gain per cost"}  # both were needed
    assert log == yaml.safe_load((tmp_path / "log.yaml").read_text())


@pytest.mark.parametrize(("storage", "workers"), [("memory", 1), ("sqlite", 1), ("journal", 2)])
def test_the_path_is_the_same_over_storages_and_workers(tmp_path, storage, workers):
    import optuna

    storages = {
        "memory": optuna.storages.InMemoryStorage(),
        "sqlite": f"sqlite:///{tmp_path}/runs.db",
        "journal": None,
    }
    log = search(tmp_path / storage, workers, rounds=2, storage=storages[storage])
    assert chosen(log) == reference(BASELINE, STEPS, 2, 2, quiet_surface(tmp_path))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_search_killed_in_the_middle_of_a_round_goes_on_there(tmp_path, workers):
    words = [sys.executable, Path(__file__).with_name("killed_search.py"), tmp_path, workers, 0.1]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    process = subprocess.Popen([str(word) for word in words], env=environment, start_new_session=True)
    deadline = time.monotonic() + 60
    while len([line for line in notes(tmp_path) if "round1" in line and "start" in line]) < 3:  # of 14
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = [line for line in notes(tmp_path) if line.startswith("end")]
    log = search(tmp_path, seconds=0.1, rounds=2)
    assert chosen(log) == reference(BASELINE, STEPS, 2, 2, quiet_surface(tmp_path))
    after = [line for line in notes(tmp_path) if line.startswith("end")]
    assert after[: len(before)] == before
    for line in after:  # nothing whose result was written ran again
        if line.endswith("-retry1"):
            assert not (
                tmp_path / "runs" / line.removeprefix("end ").removesuffix("-retry1") / "metrics.json"
            ).exists()


def test_a_search_started_again_runs_only_what_is_new(tmp_path):
    first = search(tmp_path, rounds=1)
    ran = len(notes(tmp_path))
    assert search(tmp_path, rounds=1) == first
    assert len(notes(tmp_path)) == ran
    assert chosen(search(tmp_path, rounds=3))[:1] == chosen(first)
    assert len(notes(tmp_path)) > ran


@pytest.mark.parametrize(
    ("changes", "index"),
    [
        ([(0.5, 1), (0.001, -1)], 1),  # better and cheaper, though the other gains more
        ([(0.5, 1), (0.0, -1)], 1),  # as good and cheaper
        ([(0.5, 1), (0.001, 0)], 1),  # better at the same cost
        ([(0.1, -5), (0.2, -1)], 1),  # of two, the larger gain
        ([(0.1, -1), (0.1, -5)], 1),  # then the larger saving
        ([(0.5, 10), (0.1, 1)], 1),  # the ratio
        ([(0.5, 10), (-0.1, -100)], 0),  # worse is never accepted, however cheap
        ([(-0.1, -100), (0.0, 0), (0.0, 5), (-0.1, 5), None], None),
        ([None, (0.1, 1)], 1),
        ([], None),
    ],
)
def test_the_order_of_choice(changes, index):
    compared = [
        each and compare(Measured((0.5,), 100.0), Measured((0.5 + each[0],), 100.0 + each[1])) for each in changes
    ]
    choice = choose(compared)
    assert (choice and choice.index) == index


def test_a_gain_within_the_noise_of_seeds_is_none(tmp_path):
    baseline = Measured((0.50, 0.60, 0.70), 10.0)
    noisy, steady = Measured((0.65, 0.55, 0.75), 11.0), Measured((0.52, 0.62, 0.72), 11.0)
    assert choose([compare(baseline, noisy, 2.0)]) is None
    assert choose([compare(baseline, noisy, 0.0)]).index == 0
    assert choose([compare(baseline, noisy, 2.0), compare(baseline, steady, 2.0)]).index == 1
    gains = [0.15, -0.05, 0.05]
    error = math.sqrt(sum((gain - 0.05) ** 2 for gain in gains) / 2 / 3)
    assert compare(baseline, noisy).standard_error == pytest.approx(error)
    cheaper = Measured((0.65, 0.55, 0.75), 9.0)  # not measurably better, but not worse and cheaper
    assert choose([compare(baseline, cheaper, 2.0)]).index == 0


def test_every_configuration_runs_with_every_seed(tmp_path):
    settings = replace(SETTINGS, increments={"n_embd": 4}, random_iterations=3)
    log = search(tmp_path, settings=settings, rounds=1, noise=0.3, seed=5)
    entry = log["iterations"][1]["candidates"][0]
    assert [run["seed"] for run in entry["seeds"]] == [5, 6, 7]
    scores = [math.exp(-run["loss"]) for run in entry["seeds"]]
    assert entry["avg_score"] == pytest.approx(sum(scores) / 3)
    assert entry["avg_loss"] == pytest.approx(-math.log(sum(scores) / 3))
    assert len(RunQueue(tmp_path).outcomes()) == 3 * (1 + len(log["iterations"][1]["candidates"]))


def values(baseline, increments, iterations=1, **options):
    return [(each.param, each.value, each.config) for each in candidates(baseline, increments, iterations, **options)]


def test_numbers_are_incremented_exactly_and_whole_ones_stay_whole():
    assert [value for _, value, _ in values({"lr": 0.1}, {"lr": 0.1}, 3)] == [0.2, 0.3, 0.4]
    assert [value for _, value, _ in values({"n": 4}, {"n": 0.5}, 4, direction="both")] == [5, 6, 3, 2]
    assert [value for _, value, _ in values({"n": 4}, {"n": 2}, 2, direction="down")] == [2, 0]


def test_lists_change_one_element_at_a_time():
    found = values({"w": [8, None, 16]}, {"w": 4}, direction="both")
    assert found == [
        ("w[0]", 12, {"w": [12, None, 16]}),
        ("w[2]", 20, {"w": [8, None, 20]}),
        ("w[0]", 4, {"w": [4, None, 16]}),
        ("w[2]", 12, {"w": [8, None, 12]}),
    ]


def test_a_layer_more_is_a_copy_of_one_with_its_elements_of_lists():
    baseline = {
        "n_layer": 4,
        "attention_variant": ["causal", "ssm"],
        "n_head_layerlist": [1, 2, 3, 4],
        "other": [7, 8],
    }
    more = {"layer_lists": ["attention_variant"]}
    ((_, value, config),) = values(baseline, {"n_layer": 1}, **more)
    assert value == {"dup": 1, "new_layers": 5}
    assert config["attention_variant"] == ["causal", "ssm", "ssm", "causal", "ssm"]
    assert (config["n_head_layerlist"], config["other"]) == ([1, 2, 2, 3, 4], [7, 8])
    each = values(baseline, {"n_layer": 1}, nlayer_dup_mode="dup_each", **more)
    assert [config["n_head_layerlist"] for _, _, config in each] == [
        [1, 1, 2, 3, 4], [1, 2, 2, 3, 4], [1, 2, 3, 3, 4], [1, 2, 3, 4, 4],
    ]  # fmt: skip
    ((_, value, config),) = values(baseline, {"n_layer": 2}, direction="down", **more)
    assert value == {"drop": 1, "new_layers": 2}
    assert config["n_head_layerlist"] == [1, 4]
    assert config["attention_variant"] == ["causal", "ssm"]


def test_lists_of_layers_are_as_long_as_there_are_layers_whichever_are_left_out():
    baseline = {"n_layer": 4, "x_layerlist": [1, 2, 3, 4]}
    found = values(baseline, {"n_layer": 1}, 3, direction="down", nlayer_dup_mode="dup_each")
    lists = {tuple(config["x_layerlist"]) for _, _, config in found}
    assert {len(config["x_layerlist"]) - config["n_layer"] for _, _, config in found} == {0}
    assert lists == {(2, 3, 4), (1, 3, 4), (1, 2, 4), (1, 2, 3), (3, 4), (1, 4), (1, 2), (4,), (1,)}


def test_candidates_that_fail_are_recorded_and_skipped(tmp_path):
    log = search(tmp_path, rounds=1, settings=replace(SETTINGS, increments={"n_head": 1, "n_embd": 4}))
    failed = [entry for entry in log["iterations"][1]["candidates"] if "error" in entry]
    assert {entry["value"] for entry in failed} == {3, 5, 6}  # heads that do not divide 16
    assert "does not divide" in failed[0]["error"]["message"]
    assert chosen(log)[0] is not None


def dying(flags, folder):
    """Neither 2 can be evaluated, as if memory did not suffice, nor is 1 as good as 3."""
    trouble = {1: "none", 2: "kill"}.get(flags["n"])
    return {
        **troubled({"trouble": trouble or "none"}, folder),
        "best_val_loss": 2.0 - flags["n"] / 10,
        "num_params": 1,
    }


def test_a_candidate_whose_process_is_killed_is_skipped(tmp_path):
    settings = SearchSettings({"n": 1}, iterations=2)
    log = greedy_search({"n": 1}, settings, Pool(dying, tmp_path), results_file=tmp_path / "log.yaml")
    assert [entry.get("error", {}).get("type") for entry in log["iterations"][1]["candidates"]] == [
        "ProcessDied",
        None,
    ]
    assert chosen(log) == [("n", 3)]


def test_a_baseline_that_fails_ends_the_search(tmp_path):
    with pytest.raises(RuntimeError, match="the baseline failed .*n_head=5 does not divide"):
        search(tmp_path, n_head=5)


def partly_measured(flags, folder):
    latency = {} if flags["n"] == 2 else {"iter_latency_avg": 1.0}
    return {"best_val_loss": 800.0 if flags["n"] == 3 else 2 - flags["n"] / 10, **latency}


def test_candidates_that_cannot_be_compared_are_skipped(tmp_path):
    settings = SearchSettings({"n": 1}, iterations=3, efficiency_target="iter")
    pool = Pool(partly_measured, tmp_path, in_process=True)
    log = greedy_search({"n": 1, "seed": None}, settings, pool, results_file=tmp_path / "log.yaml")
    errors = [entry.get("error", {}).get("message", "") for entry in log["iterations"][1]["candidates"]]
    assert "'iter' needs iter_latency_avg" in errors[0]
    assert "the loss 800 is too large" in errors[1]
    assert chosen(log) == [("n", 4)]
    with pytest.raises(RuntimeError, match="the baseline failed .*'iter' needs iter_latency_avg"):
        greedy_search({"n": 2}, settings, pool, results_file=tmp_path / "other.yaml")


def test_the_search_ends_when_nothing_pays_or_trains_longer_on_request(tmp_path):
    settings = SearchSettings({"lr": 0.001})
    log = search(tmp_path / "end", settings=settings, rounds=5, lr=0.003)
    assert (log["stop_reason"], chosen(log)) == ("no_positive_efficiency", [None])
    longer = replace(settings, max_iters_increase=500)
    log = search(tmp_path / "longer", settings=longer, rounds=2, lr=0.003, max_iters=1000)
    assert [entry.get("action") for entry in log["iterations"]] == [
        None, "max_iters_increased_to_1500", "max_iters_increased_to_2000",
    ]  # fmt: skip
    losses = [entry["baseline_metrics"]["loss"] for entry in log["iterations"]]
    assert losses[0] - losses[1] == pytest.approx(20 / 1000 - 20 / 1500)  # measured again, with longer training
    assert log["stop_reason"] == "num_iterations"


def exps(flags):
    if flags["n_embd"] > 20:
        raise ValueError("too wide for the report")
    return SimpleNamespace(exps_per_token=flags["n_head"] * flags["n_layer"])


def test_costs_of_the_hardware_report_need_no_run(tmp_path):
    settings = SearchSettings({"n_embd": 4, "n_layer": 1}, iterations=2, efficiency_target="exp")
    pool = Pool(surface, tmp_path, in_process=True)
    log = greedy_search(BASELINE, settings, pool, results_file=tmp_path / "log.yaml", report=exps)
    entries = log["iterations"][1]["candidates"]
    assert [entry.get("delta_cost") for entry in entries] == [0, None, 4, 8]
    assert entries[1]["error"] == {"type": "ValueError", "message": "too wide for the report", "traceback": ""}
    assert len(RunQueue(tmp_path).outcomes()) == 4  # the refused one did not run
    assert chosen(log) == [("n_embd", 20)]  # better at no cost
    with pytest.raises(ValueError, match="needs report="):
        greedy_search(BASELINE, settings, pool, results_file=tmp_path / "other.yaml")


@pytest.mark.parametrize(
    ("baseline", "settings", "told"),
    [
        ({"n": 1}, {"increments": {"m": 1}}, "'m' is not in orig_settings"),
        ({"n": True}, {"increments": {"n": 1}}, "'n' is True; only numbers"),
        ({"n": "4"}, {"increments": {"n": 1}}, "'n' is '4'; only numbers"),
        ({"n": 1}, {"increments": {"n": 0}}, "none of them 0"),
        ({"n": 1}, {"increments": {"n": math.nan}}, "pass a finite one"),
        ({"n": 1}, {"increments": {"n": 1}, "iterations": 0}, "iterations=0 must be at least 1"),
        ({"n": 1}, {"increments": {"n": 1}, "efficiency_target": "area"}, "efficiency_target='area' is unknown"),
        ({"n": 1}, {"increments": {"n": 1}, "direction": "left"}, "direction='left' is unknown"),
        ({"n": 1}, {"increments": {"n": 1}, "max_iters_increase": 5}, "needs max_iters"),
        ({"d": 0}, {"increments": {"d": 0.1}}, "'d' is the whole number 0, .* Write 0.0 in orig_settings"),
        ({"w": [0.5, 1]}, {"increments": {"w": 0.5}}, "'w' is the whole number 1,"),
    ],
)
def test_what_cannot_be_searched_is_refused(tmp_path, baseline, settings, told):
    pool = Pool(stub, tmp_path, in_process=True)

    def start():
        greedy_search(baseline, SearchSettings(**settings), pool, results_file=tmp_path / "log.yaml")

    with pytest.raises(ValueError, match=told):
        start()


def test_the_results_of_another_search_are_not_overwritten(tmp_path):
    search(tmp_path, rounds=1)
    with pytest.raises(ValueError, match="holds a search with other settings"):
        search(tmp_path, rounds=1, lr=0.002)


def test_the_path_is_plotted_over_its_candidates(tmp_path):
    log = search(tmp_path, rounds=2)
    figure = plot_search(tmp_path / "log.yaml", tmp_path / "path.png")
    (line,) = figure.axes[0].lines
    metrics = [entry["baseline_metrics"] for entry in log["iterations"]]
    assert line.get_xydata().tolist() == [[each["cost"], each["score"]] for each in metrics]
    assert [label for _, _, label in accepted_path(log)][0] == "baseline"
    assert (tmp_path / "path.png").read_bytes()[1:4] == b"PNG"
