"""Tokenizers of single characters and of bytes, as `tokenizers` objects that `AutoTokenizer` loads again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode


__all__ = [
    "batch_encoder",
    "byte_tokenizer",
    "char_tokenizer",
    "character_ids",
    "encode_text",
    "ids_end",
    "load_tokenizer",
]

EVERY_CHARACTER = r"[\s\S]"
CODE_POINTS = 0x110000
Encoder = Callable[[list[str]], list[np.ndarray]]


def char_tokenizer(vocabulary: Iterable[str] | Mapping[str, int]) -> PreTrainedTokenizerFast:
    """One id per character, and nothing else: no special tokens, so that the vocabulary stays what the text has.

    It has no padding token, since every id is a character that decoding must keep; pad with id 0 under a mask.

    Args:
        vocabulary (`Iterable[str]` or `Mapping[str, int]`): the characters, numbered in sorted order as nanoGPT's
            `prepare.py` does; or the id of each.

    Returns:
        `PreTrainedTokenizerFast`: encodes and decodes whitespace, newlines and emoji unchanged.

    Raises:
        ValueError: an entry is not one character, or the ids are not 0, 1, 2, …
    """
    if not isinstance(vocabulary, Mapping):
        vocabulary = {character: i for i, character in enumerate(sorted(set(vocabulary)))}
    if longer := [entry for entry in vocabulary if not isinstance(entry, str) or len(entry) != 1]:
        raise ValueError(f"{longer[0]!r} is not one character; a character tokenizer cannot be made of it.")
    if sorted(vocabulary.values()) != list(range(len(vocabulary))):
        raise ValueError(f"the ids of {len(vocabulary)} characters must be 0 to {len(vocabulary) - 1}, each once.")
    tokenizer = Tokenizer(models.WordLevel(dict(vocabulary)))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(EVERY_CHARACTER), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """256 ids, those of the bytes of UTF-8: every text has an encoding, and decodes to itself."""
    tokenizer = Tokenizer(models.WordLevel({character: byte for byte, character in bytes_to_unicode().items()}))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            pre_tokenizers.Split(Regex(EVERY_CHARACTER), "isolated"),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A tokenizer of the Hub or of a folder.

    Raises:
        ValueError: there is none of this name.
    """
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise ValueError(
            f"tokenizer={name!r} cannot be loaded: {reason}. Pass 'char', 'byte', a Hub id or a folder."
        ) from error


def character_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int] | None:
    """The vocabulary of a tokenizer made by [`char_tokenizer`]; of any other, None."""
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return None
    model = tokenizer.backend_tokenizer.model
    if not isinstance(model, models.WordLevel) or _is_bytes(tokenizer):
        return None
    vocabulary = tokenizer.get_vocab()
    is_char = all(len(entry) == 1 for entry in vocabulary)
    return vocabulary if is_char and model.unk_token not in vocabulary else None


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a text, without special tokens.

    Raises:
        ValueError: a character tokenizer does not know one of the characters.
    """
    return batch_encoder(tokenizer)([text])[0].tolist()


def ids_end(tokenizer: PreTrainedTokenizerBase) -> int:
    """The largest id and one: more than there are tokens, where ids are left out."""
    return 1 + max(tokenizer.get_vocab().values())


def batch_encoder(tokenizer: PreTrainedTokenizerBase) -> Encoder:
    """The fastest way from texts to ids: a lookup for characters and bytes, the Rust library in parallel else.

    Returns:
        `Callable`: takes texts, returns an array of ids for each; raises `UnknownCharacter`.
    """
    if _is_bytes(tokenizer):
        return lambda texts: [np.frombuffer(text.encode("utf-8", "surrogateescape"), np.uint8) for text in texts]
    if (vocabulary := character_ids(tokenizer)) is not None:
        return _CharacterEncoder(vocabulary)
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        backend = tokenizer.backend_tokenizer
        return lambda texts: [
            np.asarray(encoding.ids, np.int64)
            for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)
        ]
    return lambda texts: [
        np.asarray(ids, np.int64)
        for ids in tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    ]


class UnknownCharacter(ValueError):
    """A text has a character that the vocabulary has not.

    Attributes:
        text_index: which of the texts.
        position: of the character in it.
        character: the character.
    """

    def __init__(self, text_index: int, position: int, character: str, known: int):
        self.text_index, self.position, self.character = text_index, position, character
        super().__init__(
            f"character {character!r} (U+{ord(character):04X}) at position {position} is none of the {known} of the "
            "vocabulary. Remove it, or prepare the data anew from a text that has it."
        )


class _CharacterEncoder:
    """Looks up the id of each code point in a table."""

    def __init__(self, vocabulary: Mapping[str, int]):
        self.known = len(vocabulary)
        self.table = np.full(CODE_POINTS, -1, np.int32)
        self.table[[ord(character) for character in vocabulary]] = list(vocabulary.values())

    def __call__(self, texts: list[str]) -> list[np.ndarray]:
        return [self._encode(i, text) for i, text in enumerate(texts)]

    def _encode(self, text_index: int, text: str) -> np.ndarray:
        ids = self.table[np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)]
        if len(ids) and ids.min() < 0:
            position = int(ids.argmin())
            raise UnknownCharacter(text_index, position, text[position], self.known)
        return ids


def _is_bytes(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether it was made by [`byte_tokenizer`]."""
    return len(tokenizer) == 256 and tokenizer.get_vocab() == {c: b for b, c in bytes_to_unicode().items()}
