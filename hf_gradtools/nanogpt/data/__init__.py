"""Token files for nanoGPT-style training: made from text, read as blocks."""

from hf_gradtools.nanogpt.data.blocks import TokenBlocks
from hf_gradtools.nanogpt.data.prepare import prepare
from hf_gradtools.nanogpt.data.token_folder import TokenFolder
from hf_gradtools.nanogpt.data.tokenizers import byte_tokenizer, char_tokenizer, encode_text


__all__ = ["TokenBlocks", "TokenFolder", "byte_tokenizer", "char_tokenizer", "encode_text", "prepare"]
