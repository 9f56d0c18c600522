"""Questions about texts, to be answered from a memory: rows for `GradMemCollator` and `PromptCollator`."""

from hf_gradtools.gradmem.kv_retrieval.collating import GradMemCollator, PromptCollator
from hf_gradtools.gradmem.qa.babi import load_babi
from hf_gradtools.gradmem.qa.squad import load_squad


__all__ = ["GradMemCollator", "PromptCollator", "load_babi", "load_squad"]
