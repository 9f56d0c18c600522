"""One token for each symbol."""

from __future__ import annotations

from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from hf_gradtools.gradmem.kv_retrieval.alphabet import STRUCTURE, alphabet, check_alphabet


SPECIAL = {"pad_token": "[PAD]", "bos_token": "[BOS]", "eos_token": "[EOS]", "unk_token": "[UNK]"}


def build_kv_tokenizer(vocab_size: int = 62, symbols: str | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are single symbols: [PAD], [BOS], [EOS], [UNK], then `! ? : |`, then the alphabet.

    Args:
        vocab_size: symbols of the alphabet.
        symbols: the alphabet itself, instead.

    Raises:
        ValueError: there are not so many symbols, or one of them has a meaning of its own.
    """
    symbols = alphabet(vocab_size) if symbols is None else check_alphabet(symbols)
    tokens = [*SPECIAL.values(), *STRUCTURE, *symbols]
    tokenizer = Tokenizer(WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=SPECIAL["unk_token"]))
    tokenizer.pre_tokenizer = Split("", behavior="isolated")
    tokenizer.decoder = Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **SPECIAL)
