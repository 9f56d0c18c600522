"""Key-value retrieval: contexts with pairs `!K:V!`, queries `?!K:` and answers `V!|`, one symbol a token."""

from hf_gradtools.gradmem.kv_retrieval.alphabet import alphabet
from hf_gradtools.gradmem.kv_retrieval.collating import GradMemCollator, PromptCollator
from hf_gradtools.gradmem.kv_retrieval.dataset import generate_kv_dataset, save_kv_datasets, stream_kv_dataset
from hf_gradtools.gradmem.kv_retrieval.metrics import (
    compute_metrics,
    exact_match,
    preprocess_logits_for_metrics,
    token_accuracy,
)
from hf_gradtools.gradmem.kv_retrieval.names import KVRetrievalConfig
from hf_gradtools.gradmem.kv_retrieval.tokenizer import build_kv_tokenizer


__all__ = [
    "GradMemCollator",
    "KVRetrievalConfig",
    "PromptCollator",
    "alphabet",
    "build_kv_tokenizer",
    "compute_metrics",
    "exact_match",
    "generate_kv_dataset",
    "preprocess_logits_for_metrics",
    "save_kv_datasets",
    "stream_kv_dataset",
    "token_accuracy",
]
