"""Quality of adapters on a real fine-tuning task: GRIT beside LoRA, DoRA, AdaLoRA and Riemannian LoRA.

    python benchmarks/grit_quality.py --model MODEL --text TEXT --output out/grit_quality.jsonl
    python benchmarks/grit_quality.py --output out/grit_quality.jsonl --table

A causal LM is fine-tuned on a text it was not made for. Each method's learning rate is chosen on a seed of its own,
then the test seeds are run with it. Reported per method: loss on held-out text, adapter parameters that are left, size
of the saved adapter, time of a step relative to LoRA's (rough: the machine does other things), and drift: the KL
divergence from the base model on text that the base model wrote itself, that is, on what it could do before.

Every finished run is a line of the output file, so a run that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from peft.optimizers import create_riemannian_optimizer
from torch.nn.functional import cross_entropy, kl_div
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
    set_seed,
)

from hf_gradtools import GritConfig, GritTrainer


RANK, ALPHA = 16, 32
TUNING_SEED = 100
SHARED = {"r": RANK, "lora_alpha": ALPHA, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def methods(steps: int) -> dict[str, Any]:
    """Name → adapter config."""
    adalora = {"tinit": steps // 10, "tfinal": steps // 3, "deltaT": 5, "total_step": steps}
    rank8 = {**SHARED, "r": RANK // 2, "lora_alpha": ALPHA // 2}
    return {
        "LoRA r=16": LoraConfig(**SHARED),
        "LoRA r=8": LoraConfig(**rank8),
        "GRIT (default)": GritConfig(**SHARED),
        "GRIT, not cut": GritConfig(**SHARED, reprojection=None),
        "GRIT, no preconditioner": GritConfig(**SHARED, preconditioner=None),
        "GRIT, seed's settings": GritConfig.preset("seed", **SHARED, reprojection_freq=steps // 3),
        "Riemannian LoRA r=16": LoraConfig(**SHARED),
        "DoRA r=16": LoraConfig(**SHARED, use_dora=True),
        "AdaLoRA 16→8": AdaLoraConfig(init_r=RANK, target_r=RANK // 2, **adalora, **SHARED),
        "GRIT, kfac": GritConfig(**SHARED, preconditioner="kfac"),
        "GRIT, by layer": GritConfig(**SHARED, rank_allocation="layer"),
    }


class AllocateRanks(TrainerCallback):
    """AdaLoRA's budget, which its model leaves to the training loop."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model.base_model.update_and_allocate(state.global_step)


class Task:
    """Model, data and measures."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        ids = tokenizer(Path(args.text).read_text())["input_ids"]
        blocks = [ids[i : i + args.length] for i in range(0, len(ids) - args.length, args.length)]
        order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(0)).tolist()
        blocks = [blocks[i] for i in order]
        held = args.eval_rows
        self.validation, self.test = torch.tensor(blocks[:held]), torch.tensor(blocks[held : 2 * held])
        train = blocks[2 * held :]
        self.train = Dataset.from_dict({"input_ids": train, "labels": train})
        base = self.model().eval()
        set_seed(0)
        start = torch.full((args.eval_rows // 2, 1), base.config.bos_token_id)
        self.own_text = base.generate(
            start, do_sample=True, max_new_tokens=args.length, pad_token_id=0, use_cache=True, eos_token_id=None
        )
        self.base_logits = [logits.log_softmax(-1) for logits in self.logits(base, self.own_text)]
        self.base_loss = self.loss(base, self.test)

    def model(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.args.model, dtype=torch.float32)

    @staticmethod
    @torch.no_grad()
    def logits(model: Any, rows: torch.Tensor) -> list[torch.Tensor]:
        return [model(part).logits[:, :-1] for part in rows.split(8)]

    def loss(self, model: Any, rows: torch.Tensor) -> float:
        losses = [
            cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten())
            for logits, part in zip(self.logits(model, rows), rows.split(8), strict=True)
        ]
        return float(torch.stack(losses).mean())

    def drift(self, model: Any) -> float:
        """KL(base ‖ adapted) per token, in nats."""
        parts = zip(self.logits(model, self.own_text), self.base_logits, strict=True)
        each = [kl_div(new.log_softmax(-1), old, log_target=True, reduction="none").sum(-1) for new, old in parts]
        return float(torch.cat(each).mean())

    def run(self, method: str, learning_rate: float, seed: int) -> dict[str, Any]:
        set_seed(seed)
        config = methods(self.args.steps)[method]
        model = get_peft_model(self.model(), config)
        with tempfile.TemporaryDirectory() as folder:
            training = Seq2SeqTrainingArguments(
                folder,
                max_steps=self.args.steps,
                per_device_train_batch_size=self.args.batch_size,
                learning_rate=learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=self.args.steps // 20,
                logging_steps=self.args.steps // 6,
                save_strategy="no",
                report_to="none",
                use_cpu=True,
                disable_tqdm=True,
                seed=seed,
            )
            options: dict[str, Any] = {"callbacks": [AllocateRanks()]} if "AdaLoRA" in method else {}
            if "Riemannian" in method:
                optimizer = create_riemannian_optimizer(model, torch.optim.AdamW, lr=learning_rate, weight_decay=0.0)
                options["optimizers"] = (optimizer, None)
            kind = GritTrainer if isinstance(config, GritConfig) else Seq2SeqTrainer
            trainer = kind(model, training, train_dataset=self.train, **options)
            start = time.process_time()
            trainer.train()
            seconds = time.process_time() - start
            model.eval()
            model.save_pretrained(folder + "/adapter")
            size = (Path(folder) / "adapter" / "adapter_model.safetensors").stat().st_size
        return {
            "method": method,
            "learning_rate": learning_rate,
            "seed": seed,
            "validation": self.loss(model, self.validation),
            "test": self.loss(model, self.test),
            "drift": self.drift(model),
            "parameters": kept_parameters(model),
            "bytes": size,
            "cpu_seconds_per_step": seconds / self.args.steps,
            "base": self.base_loss,
        }


def kept_parameters(model: Any) -> int:
    """Trained parameters; of AdaLoRA's, which masks ranks without removing them, those that are not masked."""
    config = model.peft_config["default"]
    if not isinstance(config, AdaLoraConfig):
        return sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = 0
    for module in model.modules():
        if hasattr(module, "lora_E") and "default" in module.lora_E:
            live = int((module.lora_E["default"] != 0).sum())
            total += live * (module.lora_A["default"].shape[1] + module.lora_B["default"].shape[0] + 1)
    return total


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def tuned(rows: list[dict[str, Any]], method: str) -> float | None:
    """The learning rate with the lowest validation loss on the tuning seed."""
    tried = [row for row in rows if row["method"] == method and row["seed"] == TUNING_SEED]
    return min(tried, key=lambda row: row["validation"])["learning_rate"] if tried else None


def table(rows: list[dict[str, Any]]) -> str:
    final: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        if row["seed"] != TUNING_SEED and row["learning_rate"] == tuned(rows, row["method"]):
            final[row["method"]].append(row)

    def cell(method: str, name: str, digits: int) -> str:
        values = [row[name] for row in final[method]]
        spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{statistics.fmean(values):.{digits}f}{spread}"

    if not final["LoRA r=16"]:
        return "no test seeds of LoRA r=16 yet"
    lora = statistics.fmean(row["cpu_seconds_per_step"] for row in final["LoRA r=16"])
    lines = [
        f"Held-out loss of the base model: {rows[0]['base']:.3f}",
        "",
        "| method | seeds | learning rate | held-out loss | drift (KL) | parameters kept | file, kB | step ÷ LoRA |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method in final:
        kept = statistics.fmean(row["parameters"] for row in final[method])
        kilobytes = statistics.fmean(row["bytes"] for row in final[method]) / 1000
        ratio = statistics.fmean(row["cpu_seconds_per_step"] for row in final[method]) / lora
        lines.append(
            f"| {method} | {len(final[method])} | {tuned(rows, method):g} | {cell(method, 'test', 4)} "
            f"| {cell(method, 'drift', 4)} | {kept:,.0f} | {kilobytes:,.0f} | {ratio:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="causal LM: Hub id or folder")
    parser.add_argument("--text", help="text file to fine-tune on")
    parser.add_argument("--output", required=True, help="JSON Lines file of finished runs")
    parser.add_argument("--methods", nargs="+", help="default all")
    parser.add_argument("--learning_rates", nargs="+", type=float, default=[1e-3, 2e-3, 4e-3])
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--eval_rows", type=int, default=160)
    parser.add_argument("--table", action="store_true", help="only print the table of what is finished")
    args = parser.parse_args()
    output = Path(args.output)
    if not args.table:
        if not (args.model and args.text):
            parser.error("--model and --text are needed to run; --table prints what is finished")
        task = Task(args)
        chosen = args.methods or list(methods(args.steps))
        for method in chosen:
            wanted = [(rate, TUNING_SEED) for rate in args.learning_rates]
            for stage in ("tune", "test"):
                if stage == "test":
                    wanted = [(tuned(read(output), method), seed) for seed in args.seeds]
                for rate, seed in wanted:
                    key = (method, rate, seed)
                    if key in {(row["method"], row["learning_rate"], row["seed"]) for row in read(output)}:
                        continue
                    row = task.run(method, rate, seed)
                    print(json.dumps(row), flush=True)
                    output.parent.mkdir(parents=True, exist_ok=True)
                    with open(output, "a") as file:
                        file.write(json.dumps(row) + "\n")
    print(table(read(output)))


if __name__ == "__main__":
    main()
