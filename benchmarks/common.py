"""What the benchmarks share: interleaved timing, exact memory peaks, Markdown tables, models."""

from __future__ import annotations

import gc
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from datasets import Dataset
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM


MIB = 2**20
Result = TypeVar("Result")


@dataclass
class Variant:
    """One way to do the work that a benchmark compares.

    Args:
        run: does it once.
        installed: context in which `run` works (hooks on the model, say); entered and left outside the clock.
    """

    run: Callable[[], Any]
    installed: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass
class Times:
    """Seconds of each round: CPU time of all threads, and wall time."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    def ratio(self, baseline: Times, clock: str) -> float:
        """Median over the rounds of the ratio to the baseline of the same round, so that a slow minute of the machine
        weighs on both."""
        pairs = zip(getattr(self, clock), getattr(baseline, clock), strict=True)
        return statistics.median(mine / theirs for mine, theirs in pairs)


@contextmanager
def stopwatch(times: Times) -> Iterator[None]:
    gc.collect()
    cpu, wall = time.process_time(), time.perf_counter()
    yield
    times.cpu.append(time.process_time() - cpu)
    times.wall.append(time.perf_counter() - wall)


def time_interleaved(variants: Mapping[str, Variant], rounds: int) -> dict[str, Times]:
    """Times each variant once per round in one process; every round starts one variant further on."""
    names = list(variants)
    times = {name: Times() for name in names}
    for start in range(rounds):
        for name in names[start % len(names) :] + names[: start % len(names)]:
            with variants[name].installed(), stopwatch(times[name]):
                variants[name].run()
    return times


def peak_bytes(work: Callable[[], Result]) -> tuple[int, Result]:
    """The largest sum of live tensor bytes while `work` runs, above what was live before it, and what `work` returns.

    Replays the allocations and frees that torch's profiler records in the CPU allocator. That is exact, and it sees
    what autograd and kernels hold inside C++, which Python-side trackers of storages miss; the process' resident set
    would be blurred by what malloc keeps. Frees of what was live before count for nothing, and the scratch of the
    matrix library, which is not torch's, is not in it. :func:`check_peak_bytes` holds it against a known answer.
    """
    gc.collect()
    with (
        _quiet_profiler(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=False) as record,
    ):
        result = work()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak, result


def check_peak_bytes() -> None:
    """Two cases with known answers: temporaries that replace each other, and a backward pass.

    Raises:
        AssertionError: the profiler of this torch build does not report what it should.
    """
    n = 512
    matrix = n * n * 4

    def temporaries() -> None:
        a = torch.ones(n, n)
        b = a.exp()
        del a
        c = b.exp()
        del b, c
        torch.ones(n, n).add(1).add_(1)

    def backward() -> None:
        x = torch.ones(n, n, requires_grad=True)
        (x.exp()).sum().backward()  # x, exp(x), and the gradient; that of the sum is an expanded scalar

    for work, expected in ((temporaries, 2 * matrix), (backward, 3 * matrix)):
        found, _ = peak_bytes(work)
        assert abs(found - expected) < 4096, f"the profiler reports a peak of {found} bytes where it is {expected}"


@contextmanager
def _quiet_profiler() -> Iterator[None]:
    """Without the lines that the profiler's C++ writes at start, stop and each free of older memory."""
    sys.stderr.flush()
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headers, ["---", *["---:"] * (len(headers) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def environment() -> str:
    """The line under a table: command, versions, threads, processor."""
    command = " ".join(["python", *map(shlex.quote, [os.path.relpath(sys.argv[0]), *sys.argv[1:]])])
    return (
        f"`{command}` · torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{torch.get_num_threads()} threads on {os.cpu_count()} CPUs ({_processor()})"
    )


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


# ---- models and data


def gpt2(width: int, layers: int) -> nn.Module:
    config = GPT2Config(
        n_embd=width, n_layer=layers, n_head=width // 64, vocab_size=8192, n_positions=1024, bos_token_id=0,
        eos_token_id=0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def smollm2() -> nn.Module:
    """SmolLM2-135M, or a model of random weights and the same sizes where the demo extra is not installed."""
    try:
        from hf_gradtools.demo import demo_model_path

        return AutoModelForCausalLM.from_pretrained(demo_model_path(), dtype=torch.float32)
    except ImportError:
        config = LlamaConfig(
            hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
            num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True, max_position_embeddings=8192,
        )  # fmt: skip
        return LlamaForCausalLM(config)


def smollm2_lora() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    # B starts at zero otherwise, and with it every gradient of A.
    config = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    return get_peft_model(smollm2(), config)


def random_rows(count: int, tokens: int, seed: int) -> Dataset:
    ids = torch.randint(1, 8000, (count, tokens), generator=torch.Generator().manual_seed(seed)).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def llama(width: int, layers: int) -> nn.Module:
    config = LlamaConfig(
        hidden_size=width, intermediate_size=width * 43 // 16, num_hidden_layers=layers,
        num_attention_heads=width // 64, vocab_size=8192, max_position_embeddings=1024,
    )  # fmt: skip
    return LlamaForCausalLM(config)
