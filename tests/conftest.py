"""Shared by all tests: offline, one thread, one seed; `--run-slow`; skips with a reason."""

import os


os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
    MPLBACKEND="Agg",
)

import importlib.util
import random

import numpy as np
import pytest
import torch


SEED = 0


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="also run the tests marked slow")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    reasons = _skip_reasons(config)
    for item in items:
        for marker in reasons.keys() & {mark.name for mark in item.iter_markers()}:
            item.add_marker(pytest.mark.skip(reason=reasons[marker]))


def _skip_reasons(config: pytest.Config) -> dict[str, str]:
    """Marker -> why its tests cannot or shall not run here."""
    reasons = {}
    if not config.getoption("--run-slow"):
        reasons["slow"] = "slow: run by --run-slow"
    if not torch.cuda.is_available():
        reasons["gpu"] = "no CUDA device"
    if not torch.distributed.is_available():
        reasons["distributed"] = "torch was built without torch.distributed"
    if importlib.util.find_spec("bitsandbytes") is None:
        reasons["bnb"] = "bitsandbytes is not installed: pip install 'hf_gradtools[bnb]'"
    return reasons


@pytest.fixture
def datasets_cache(tmp_path, monkeypatch):
    """Keeps what `datasets` caches within the test."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Folder of a Llama of two layers and a tokenizer of a few words. Not to be written to."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<unk>", "<eos>", ":", "?", "Question", "Answer", "yes", "no", *map(str, range(10)), *"abcdefghij"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")
    folder = tmp_path_factory.mktemp("tiny")
    fast.save_pretrained(folder)
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seeds random, numpy and torch before every test; ask for it by name to get the number."""
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    return SEED
