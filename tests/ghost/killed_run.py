"""Trains in a child process that is killed again and again; started by test_resume.py as a script.

The parent imports everything once and forks, so an attempt costs no import.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

from transformers import Trainer, TrainingArguments

from hf_gradtools import GhostDotProdCallback
from tests.ghost.reference import llama, rows


STEPS, SAVE_STEPS = 100, 5


def run(path: Path) -> None:
    args = TrainingArguments(
        str(path / "out"), per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=STEPS,
        learning_rate=1e-3, report_to="none", save_steps=SAVE_STEPS, save_total_limit=3, disable_tqdm=True,
        use_cpu=True, seed=3, logging_strategy="no",
    )  # fmt: skip
    callback = GhostDotProdCallback(
        rows(12, seed=9), output_dir=str(path / "ghost"), val_batch_size=4, rows_per_shard=30
    )
    checkpoint = last_whole_checkpoint(path / "out")
    if checkpoint is not None and checkpoint.endswith(f"-{STEPS}"):
        return  # Trainer would go on beyond max_steps
    trainer = Trainer(llama(), args, train_dataset=rows(22), callbacks=[callback])
    trainer.train(resume_from_checkpoint=checkpoint)


def last_whole_checkpoint(folder: Path) -> str | None:
    """Trainer writes a checkpoint in place; what a kill left half-written is removed."""
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=lambda p: -int(p.name.split("-")[1])):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text())
        except (FileNotFoundError, ValueError):
            shutil.rmtree(checkpoint)
        else:
            return str(checkpoint)
    return None


def wait_for_rows(folder: Path) -> None:
    """Until the child writes, at most five seconds."""

    def written() -> int:
        sizes = 0
        for file in folder.glob("*.inprogress"):
            with contextlib.suppress(FileNotFoundError):  # sealed since it was listed
                sizes += file.stat().st_size
        return sizes

    before, deadline = written(), time.time() + 5
    while time.time() < deadline and written() <= before:
        before = min(before, written())
        time.sleep(0.002)


def main(path: Path, kills: int) -> None:
    moments = random.Random(0)
    for kill in range(kills + 1):
        child = os.fork()
        if child == 0:
            run(path)
            os._exit(0)
        if kill < kills:
            if kill % 4:  # the others die while they start
                wait_for_rows(path / "ghost")
            time.sleep(moments.uniform(0.0, 0.25))
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
