import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from hf_gradtools.nanogpt.data import byte_tokenizer


ALPHABET = "\n []/$abcdefghijklmnopqrstuvwxyz€."


@pytest.fixture
def chars():
    """One token per character of ALPHABET, none of them special."""
    tokenizer = Tokenizer(models.WordLevel({character: i for i, character in enumerate(ALPHABET)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture
def byte_level():
    """One token per byte, without merges, as GPT-2 writes bytes."""
    vocabulary = {character: byte for byte, character in bytes_to_unicode().items()}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture
def our_bytes():
    """The byte tokenizer that datasets are prepared with."""
    return byte_tokenizer()


@pytest.fixture
def byte_fallback():
    """Bytes as SentencePiece writes them, <0xE2>, beside two words with their spaces."""
    names = [f"<0x{byte:02X}>" for byte in range(256)] + ["▁hello", "▁you"]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture
def gpt2(chars):
    """A GPT-2 of 16 positions and spread-out logits, over `chars`."""
    config = GPT2Config(
        vocab_size=len(chars), n_positions=16, n_embd=32, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None
    )
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        model.transformer.wte.weight.mul_(8)
    return model
