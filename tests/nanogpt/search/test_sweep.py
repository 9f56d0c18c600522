"""Sweeps: every run once, whoever dies on the way; failures recorded; results as documents and as a table."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from hf_gradtools.nanogpt.search import storage
from hf_gradtools.nanogpt.search.execute import attempt_folder, earlier_folders
from hf_gradtools.nanogpt.search.exploration import Run
from hf_gradtools.nanogpt.search.liveness import Worker
from hf_gradtools.nanogpt.search.results import METRICS, results_table
from hf_gradtools.nanogpt.search.run_queue import RunQueue
from hf_gradtools.nanogpt.search.sweep import run_sweep
from tests.nanogpt.search.killed_sweep import configs
from tests.nanogpt.search.stub_runs import gpus, note, notes, stub, troubled


ROOT = Path(__file__).parents[3]


def start(folder, workers=2, runs=4, seconds=0.6, *own):
    words = [sys.executable, Path(__file__).with_name("killed_sweep.py"), folder, workers, runs, seconds, *own]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([str(word) for word in words], env=environment, start_new_session=True)


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


def assert_none_lost_none_doubled(folder, runs):
    attempts = RunQueue(folder).attempts()
    assert len(attempts) == runs
    for each in attempts.values():
        assert [attempt.status for attempt in each] == ["lost"] * (len(each) - 1) + ["complete"]
        done = [
            number
            for number in range(len(each))
            if (attempt_folder(folder / "runs", each[0].run, number) / "metrics.json").exists()
        ]
        assert len(done) == 1  # nothing ran again once its result was written
        x = each[0].run.config["x"]
        assert 1 <= notes(folder).count(f"end {x}") <= notes(folder).count(f"start {x}") <= len(each)
    documents = list(yaml.safe_load_all((folder / "results.yaml").read_text()))
    assert sorted(document["config"]["x"] for document in documents) == list(range(1, runs + 1))


@pytest.mark.parametrize("killed", ["main process", "all processes"])
def test_two_workers_killed_and_restarted_lose_and_double_no_run(tmp_path, killed):
    process = start(tmp_path)
    wait_for(lambda: len([line for line in notes(tmp_path) if line.startswith("start")]) >= 3)
    (os.kill if killed == "main process" else os.killpg)(process.pid, signal.SIGKILL)
    process.wait()
    assert start(tmp_path).wait(60) == 0
    assert_none_lost_none_doubled(tmp_path, 4)


def test_a_worker_that_is_killed_is_replaced(tmp_path):
    process = start(tmp_path, 2, 3)
    signed = lambda: [t.user_attrs["worker"] for t in RunQueue(tmp_path)._running() if "worker" in t.user_attrs]  # noqa: E731
    wait_for(lambda: len(notes(tmp_path)) >= 1)
    os.kill(signed()[0]["pid"], signal.SIGKILL)
    assert process.wait(60) == 0
    assert_none_lost_none_doubled(tmp_path, 3)


def test_two_commands_that_share_a_folder_share_its_runs(tmp_path):
    first, second = start(tmp_path, 1, 6, 0.3), start(tmp_path, 1, 6, 0.3)
    assert [first.wait(60), second.wait(60)] == [0, 0]
    assert_none_lost_none_doubled(tmp_path, 6)


def test_workers_see_a_gpu_each_in_turn(tmp_path):
    run_sweep([{"x": 1}, {"x": 2}], tmp_path, gpus, workers=2, gpus=("0", "3"), in_process=True)
    assert sorted(notes(tmp_path)) == ["0", "3"]


def test_a_run_dies_with_its_killed_worker(tmp_path):
    process = start(tmp_path, 1, 1, 1.0, "own")
    wait_for(lambda: notes(tmp_path))
    process.kill()
    process.wait()
    time.sleep(1.5)
    assert notes(tmp_path) == ["start 1"]


@pytest.mark.slow
@pytest.mark.parametrize("own", [(), ("own",)])
def test_workers_killed_at_random_moments_lose_and_double_no_run(tmp_path, own):
    moments = random.Random(0)
    for _ in range(12):
        process = start(tmp_path, 2, 12, 0.3, *own)
        time.sleep(moments.uniform(0.5, 6))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert start(tmp_path, 2, 12, 0.3, *own).wait(120) == 0
    assert_none_lost_none_doubled(tmp_path, 12)


def test_a_second_start_runs_nothing_again(tmp_path):
    first = run_sweep(configs(3, 0), tmp_path, stub, in_process=True)
    second = run_sweep(configs(4, 0), tmp_path, stub, in_process=True)
    assert [outcome.metrics for outcome in second[:3]] == [outcome.metrics for outcome in first]
    assert [line for line in notes(tmp_path) if line.startswith("start")] == [f"start {x}" for x in range(1, 5)]


def test_sweeps_that_share_a_storage_keep_their_runs_apart(tmp_path):
    url = f"sqlite:///{tmp_path}/runs.db"
    for name, x in (("one", 1), ("two", 2)):
        run_sweep([{"x": x, "seconds": 0}], tmp_path / name, stub, in_process=True, storage=url)
    assert results_table(tmp_path / "two", url)["x"][:] == [2]


TROUBLES = {
    "raise": ("ValueError", "n_head=3 does not divide"),
    "kill": ("ProcessDied", "SIGKILL"),
    "exit": ("SystemExit", "--n_hed"),
    "nan": ("FloatingPointError", "best_val_loss is nan"),
    "nothing": ("KeyError", "no 'best_val_loss'"),
}


def test_failed_runs_are_recorded_with_their_errors_and_tried_again_only_on_request(tmp_path):
    asked = [{"trouble": trouble} for trouble in (*TROUBLES, "none")]
    for _ in range(2):
        outcomes = run_sweep(asked, tmp_path, troubled)
    assert [outcome.status for outcome in outcomes] == ["failed"] * 5 + ["complete"]
    for outcome, (kind, message) in zip(outcomes[:5], TROUBLES.values(), strict=True):
        assert (outcome.error["type"], outcome.attempt) == (kind, 0)
        assert message in outcome.error["message"]
    assert "in troubled\n" in outcomes[0].error["traceback"]
    assert outcomes[1].error["traceback"] == "about to kill"  # the end of its log
    again = run_sweep(asked[:1], tmp_path, troubled, in_process=True, retry_failed=True)
    assert [outcome.attempt for outcome in again] == [1]
    assert [notes(tmp_path).count(trouble) for trouble in (*TROUBLES, "none")] == [2, 1, 1, 1, 1, 1]


def whole(flags, folder):
    note(folder, json.dumps(flags))
    return {"best_val_loss": 1.0}


def test_list_valued_arguments_reach_a_run_whole_and_every_run_has_its_folder(tmp_path):
    asked = [{"attention_variant": ["causal", "ssm"], "bias": True, "n": None}, {"attention_variant": ["causal"]}]
    outcomes = run_sweep(asked, tmp_path, whole)
    assert [json.loads(line) for line in notes(tmp_path)] == asked
    folders = {Path(outcome.folder) for outcome in outcomes}
    assert len(folders) == 2
    assert all(folder.parent == tmp_path / "runs" for folder in folders)


def test_what_two_machines_enqueue_at_once_runs_once(tmp_path, monkeypatch):
    runs = [Run(config, str(config["x"])) for config in configs(3, 0)]
    first, second = RunQueue(tmp_path), RunQueue(tmp_path)
    first.enqueue(runs)
    monkeypatch.setattr(second, "outcomes", dict)  # what it saw before the first one had enqueued
    second.enqueue(runs)
    run_sweep(runs, tmp_path, stub, in_process=True)
    assert_none_lost_none_doubled(tmp_path, 3)


def taken_elsewhere(folder):
    """A queue with one run, which a worker of another machine has taken."""
    queue = RunQueue(folder, stale_seconds=0.3)
    queue.enqueue([Run({"x": 1}, "one")])
    worker = Worker(folder)
    worker.about["host"] = "elsewhere"
    with worker:
        queue.take(worker, set(queue.outcomes()))
        queue.reap()
        time.sleep(0.4)
        os.utime(worker._beating)
        queue.reap()
        assert [outcome.status for outcome in queue.outcomes().values()] == ["running"]
    return queue


def test_a_worker_of_another_machine_is_dead_once_its_heart_has_stopped(tmp_path):
    queue = taken_elsewhere(tmp_path)
    queue.reap()  # sees that the heartbeat is gone
    assert [outcome.status for outcome in queue.outcomes().values()] == ["running"]
    time.sleep(0.4)
    queue.reap()
    assert [outcome.status for outcome in queue.outcomes().values()] == ["lost"]


def test_stale_runs_are_taken_at_once_on_request(tmp_path):
    taken_elsewhere(tmp_path)
    (outcome,) = run_sweep([{"x": 1}], tmp_path, stub, in_process=True, retry_stale=True)
    assert (outcome.status, outcome.attempt) == ("complete", 1)


def test_a_worker_given_up_for_dead_cannot_record_what_now_runs_elsewhere(tmp_path, caplog):
    queue = RunQueue(tmp_path)
    queue.enqueue([Run({"x": 1}, "one")])
    with Worker(tmp_path) as worker:
        attempt = queue.take(worker, set(queue.outcomes()))
    queue._tell(attempt.trial.number, queue._states.FAIL)
    assert not queue.complete(attempt, {"best_val_loss": 5.0}, tmp_path)
    assert "one was given up for dead" in caplog.text
    (outcome,) = run_sweep([{"x": 1}], tmp_path, stub, in_process=True)
    assert (outcome.metrics["best_val_loss"], outcome.attempt) == (1, 1)


@pytest.mark.filterwarnings("ignore:The value of .grace_period.")
def test_a_record_torn_by_a_kill_and_the_lock_it_left_do_not_stop_a_sweep(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "LOCK_SECONDS", 1)
    run_sweep(configs(1, 0), tmp_path, stub, in_process=True)
    with open(tmp_path / "journal.log", "ab") as journal:
        journal.write(b'{"op_code":4,"worker_id":"dead","st')
    (tmp_path / "journal.log.lock").touch()
    run_sweep(configs(3, 0), tmp_path, stub, in_process=True)
    assert_none_lost_none_doubled(tmp_path, 3)


def test_waiting_runs_that_are_asked_for_no_more_are_set_aside_until_they_are(tmp_path):
    RunQueue(tmp_path).enqueue([Run(config, str(config["x"])) for config in configs(3, 0)])
    run_sweep(configs(1, 0), tmp_path, stub, in_process=True)
    assert notes(tmp_path) == ["start 1", "end 1"]
    run_sweep(configs(3, 0), tmp_path, stub, in_process=True)
    assert_none_lost_none_doubled(tmp_path, 3)


def test_a_result_that_a_dead_worker_could_not_record_is_taken_up(tmp_path):
    queue = RunQueue(tmp_path)
    run = Run({"x": 4}, "four")
    queue.enqueue([run])
    with Worker(tmp_path) as worker:
        attempt = queue.take(worker, {run.key})
    folder = tmp_path / "runs" / f"four-{run.key[:8]}"
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps({"key": run.key, "metrics": {"best_val_loss": 0.25}}))
    queue._tell(attempt.trial.number, queue._states.FAIL)
    (outcome,) = run_sweep([run], tmp_path, stub, in_process=True)
    assert (outcome.metrics, outcome.folder) == ({"best_val_loss": 0.25}, str(folder))
    assert notes(tmp_path) == []


def interrupted(flags, folder):
    note(folder, "after " + " ".join(earlier.name for earlier in earlier_folders(folder)))
    if len(notes(folder.parent.parent)) == 1:
        raise KeyboardInterrupt
    return {"best_val_loss": 1.0}


def test_an_interrupted_run_is_given_back(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run_sweep([{"x": 1}], tmp_path, interrupted, in_process=True)
    (outcome,) = run_sweep([{"x": 1}], tmp_path, interrupted, in_process=True)
    assert (outcome.status, outcome.attempt) == ("complete", 1)
    assert notes(tmp_path) == ["after ", f"after {Path(outcome.folder).name.removesuffix('-retry1')}"]


def test_a_run_that_has_killed_three_workers_has_failed(tmp_path):
    (outcome,) = run_sweep([{"trouble": "kill"}], tmp_path, troubled, workers=2, in_process=True)
    assert (outcome.status, outcome.error["type"]) == ("failed", "WorkerDied")
    assert notes(tmp_path) == ["kill"] * 3


def test_results_are_documents_with_the_seeds_fields_and_a_table(tmp_path):
    run_sweep(
        [{"trouble": "raise", "lr": 1}, {"trouble": "none", "lr": 0.5, "v": ["a"]}],
        tmp_path,
        troubled,
        in_process=True,
    )
    failed, complete = yaml.safe_load_all((tmp_path / "results.yaml").read_text())
    assert list(failed)[: 2 + len(METRICS)] == ["formatted_name", "config", *METRICS]
    assert failed["config"] == {"trouble": "raise", "lr": 1}
    assert failed["error"]["type"] == "ValueError"
    assert math.isnan(failed["best_val_loss"])
    assert (complete["best_val_loss"], complete["status"]) == (1.0, "complete")
    table = results_table(tmp_path)
    assert table["best_val_loss"][:] == [None, 1.0]
    assert (table["lr"][:], table["v"][:]) == ([1.0, 0.5], [None, '["a"]'])
    assert table["error"][0].startswith("ValueError: n_head=3")


def test_a_storage_that_hands_one_run_to_two_workers_is_refused(tmp_path):
    with pytest.raises(ValueError, match="SQLite hands one run to two workers"):
        run_sweep([{"x": 1}], tmp_path, stub, workers=2, storage=f"sqlite:///{tmp_path}/runs.db")
    with pytest.raises(ValueError, match="workers=0"):
        run_sweep([{"x": 1}], tmp_path, stub, workers=0)
    with pytest.raises(ValueError, match="cannot be imported by another process"):
        run_sweep([{"x": 1}], tmp_path, lambda flags, folder: {"best_val_loss": 1.0})
    with pytest.raises(ValueError, match="runs is empty"):
        run_sweep([], tmp_path, stub)
