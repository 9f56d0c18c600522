"""What texts look like to sparse autoencoders: hypotheses for tracking and max-pooled latents, from one forward each.

Shape letters: T texts, L hookpoints, K hypotheses per hookpoint, F features, D width of a hidden state, B texts of a
batch, S their padded length, N tokens counted.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_gradtools.core.inference import evaluating, free_cached_memory, is_out_of_memory
from hf_gradtools.ghosttrack.choices import SCOPES
from hf_gradtools.ghosttrack.reading.batching import forward_options, pad_token_of, padded
from hf_gradtools.ghosttrack.reading.spans import encode_answers
from hf_gradtools.ghosttrack.tracking.hypotheses import Hypotheses, top_hypotheses
from hf_gradtools.sae import hookpoints as hooks
from hf_gradtools.sae.modeling_sae import SAE


if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

__all__ = ["Reading", "TokenRow", "check_saes", "read_rows", "read_texts", "token_rows"]

logger = logging.getLogger(__name__)

HIDDEN = ("last", "mean")


class TokenRow(NamedTuple):
    """A text's tokens as the model gets them; `input_ids[begin:end]` count, `dropped` were cut off before them."""

    input_ids: list[int]
    begin: int
    end: int
    dropped: int


@dataclass(frozen=True, eq=False)
class Reading:
    """What [`read_texts`] gives for T texts.

    Args:
        hypotheses (`Hypotheses`): the strongest features of each text and hookpoint. Positions are counted from the
            first token that counts, `lengths` are the tokens that count.
        pooled (`dict[str, csr_matrix]`): by hookpoint `[T, F]` float32, each latent's maximum over those tokens.
        spans (`np.ndarray` `[T, 2]` int64): the tokens that count, `begin` and `end`, as places in the whole text.
        hidden (`dict[str, dict[str, np.ndarray]]`): `"last"` and `"mean"` -> hookpoint -> `[T, D]` float32, hidden
            states at the last of those tokens and their mean; empty unless asked for.
    """

    hypotheses: Hypotheses
    pooled: dict[str, csr_matrix]
    spans: np.ndarray
    hidden: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)

    @property
    def hookpoints(self) -> list[str]:
        """In the order of the model."""
        return self.hypotheses.layers

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, texts: Any) -> Reading:
        """The chosen texts, by a slice or an array of indices or flags."""
        if isinstance(texts, (int, np.integer)):
            texts = slice(texts, texts + 1 or None)
        rows = np.arange(len(self))[texts]
        return Reading(
            self.hypotheses[rows],
            {hookpoint: latents[rows] for hookpoint, latents in self.pooled.items()},
            self.spans[rows],
            {kind: {key: states[rows] for key, states in by.items()} for kind, by in self.hidden.items()},
        )

    @classmethod
    def concatenate(cls, parts: Sequence[Reading]) -> Reading:
        """The texts of several readings by the same autoencoders, one after the other."""
        vstack = _scipy_sparse().vstack
        hypotheses = Hypotheses.concatenate([part.hypotheses for part in parts])
        return cls(
            hypotheses,
            {key: vstack([part.pooled[key] for part in parts], format="csr") for key in hypotheses.layers},
            np.concatenate([part.spans for part in parts]),
            {
                kind: {key: np.concatenate([part.hidden[kind][key] for part in parts]) for key in by}
                for kind, by in parts[0].hidden.items()
            },
        )

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes `reading.safetensors` in `folder`, whole or not at all, with a checksum."""
        from hf_gradtools.ghosttrack.reading.reading_files import save_reading

        save_reading(self, folder)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Reading:
        """Reads what [`save`][Reading.save] wrote, or [`read_texts`] with `output_dir`.

        Raises:
            FileNotFoundError: there is no reading.
            ValueError: a file is damaged, or the reading was never finished.
        """
        from hf_gradtools.ghosttrack.reading.reading_files import load_reading

        return load_reading(folder)


def read_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    saes: Mapping[str, SAE],
    texts: Sequence[str],
    answer_starts: Sequence[int] | None = None,
    *,
    top_k: int = 50,
    batch_size: int = 16,
    max_length: int = 512,
    scope: str = "answer",
    skip_first: int = 1,
    hidden: bool = False,
    output_dir: str | os.PathLike[str] | None = None,
    chunk_texts: int = 256,
    progress: bool = True,
) -> Reading:
    """Runs texts through a model and its autoencoders and keeps what detection and tracking need.

    One forward per text serves all hookpoints and ends at the last one; autoencoders see only tokens that count.
    Batches hold texts of similar lengths and change no result but its rounding. When memory runs out the batch is
    halved, with a warning, and reading goes on.

    Args:
        model (`PreTrainedModel`): a causal LM, of any type.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer, a fast one.
        saes (`Mapping[str, SAE]`): by hookpoint, in the order of the model.
        texts (`Sequence[str]`): prompts with their answers.
        answer_starts (`Sequence[int]`, *optional*): character at which each answer begins; default 0, the whole text.
        top_k (`int`, defaults to 50): hypotheses per text and hookpoint.
        batch_size (`int`, defaults to 16): texts at a time.
        max_length (`int`, defaults to 512): tokens of a text; of a longer one, and of one longer than the model takes,
            the last so many are read, after its beginning-of-text token.
        scope (`str`, defaults to `"answer"`): which tokens count, those of the `"answer"` or of the whole `"text"`.
        skip_first (`int`, defaults to 1): first positions that never count: attention sinks, whose activations are
            orders of magnitude larger than all others.
        hidden (`bool`, defaults to `False`): keep hidden states for probes, `8 * T * L * D` bytes.
        output_dir (`str` or `os.PathLike`, *optional*): folder of chunk files; a reading that was killed goes on where
            it ended, and one that is complete is only loaded.
        chunk_texts (`int`, defaults to 256): texts of such a file.
        progress (`bool`, defaults to `True`): show a bar.

    Raises:
        ValueError: a text is empty or has no token that counts, an autoencoder does not fit the model, or
            `output_dir` holds a reading of something else.
    """
    texts = list(texts)
    check_saes(model, saes)
    for name, value in (("batch_size", batch_size), ("chunk_texts", chunk_texts)):
        if value < 1:
            raise ValueError(f"{name}={value} is no number of texts; need at least 1. Pass {name}=16.")
    rows = token_rows(
        model, tokenizer, texts, answer_starts, max_length=max_length, scope=scope, skip_first=skip_first
    )
    reader = _Reader(model, dict(saes), pad_token_of(tokenizer), top_k, batch_size, hidden)
    if output_dir is None:
        return reader.read(rows, progress)
    from hf_gradtools.ghosttrack.reading.reading_files import read_in_chunks

    settings = {"top_k": top_k, "hidden": hidden, "hookpoints": list(saes)}
    return read_in_chunks(output_dir, reader.read, rows, (model, *saes.values()), settings, chunk_texts, progress)


def read_rows(
    model: PreTrainedModel,
    saes: Mapping[str, SAE],
    rows: Sequence[TokenRow],
    *,
    pad_token: int = 0,
    top_k: int = 50,
    batch_size: int = 16,
    hidden: bool = False,
) -> Reading:
    """[`read_texts`] of texts that are tokens already."""
    return _Reader(model, dict(saes), pad_token, top_k, batch_size, hidden).read(rows)


def token_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    answer_starts: Sequence[int] | None = None,
    *,
    max_length: int = 512,
    scope: str = "answer",
    skip_first: int = 1,
) -> list[TokenRow]:
    """Tokens of texts and which of them count; the arguments are those of [`read_texts`]."""
    if not texts:
        raise ValueError("texts has 0 rows; need at least 1 text. Pass texts=['Paris is the capital of France.'].")
    if scope not in SCOPES:
        raise ValueError(f"scope={scope!r} is not known; need one of {SCOPES}. Pass scope='answer'.")
    if skip_first < 0 or max_length <= skip_first:
        raise ValueError(
            f"max_length={max_length} leaves no token after skip_first={skip_first}, or one of them is negative. "
            "Pass max_length=512, skip_first=1."
        )
    limit = getattr(hooks.base_model(model).config.get_text_config(), "max_position_embeddings", None)
    limit = max_length if limit is None else min(max_length, limit)
    starts = [0] * len(texts) if answer_starts is None or scope == "text" else answer_starts
    rows = []
    for number, span in enumerate(encode_answers(tokenizer, texts, starts)):
        begin = max(span.begin, skip_first)
        row = _cut(TokenRow(span.input_ids, begin, span.end, 0), limit, skip_first, tokenizer.bos_token_id)
        if row.begin >= row.end:
            raise ValueError(
                f"text {number} has {len(span.input_ids)} tokens, and the first {skip_first} never count "
                f"(skip_first), so none is left: {texts[number]!r}. Leave the row out, or put a prompt before it."
            )
        rows.append(row)
    if long := sum(row.dropped > 0 for row in rows):
        logger.warning(
            "%d of %d texts have more than %d tokens; their beginnings are cut off.", long, len(rows), limit
        )
    return rows


def check_saes(model: PreTrainedModel, saes: Mapping[str, SAE]) -> None:
    """ValueError if there is no autoencoder, or one is of another width than the model's hidden states there."""
    if not saes:
        raise ValueError("saes is empty; need an autoencoder for 1 hookpoint at least. Pass load_many(folder).")
    decoder = hooks.base_model(model)
    for hookpoint, sae in saes.items():
        hooks.resolve(model, hookpoint)
        match = hooks.BLOCK.fullmatch(hookpoint)
        plain = match is not None and not match[2]  # the output of a block: no forward is needed to know its width
        width = decoder.config.get_text_config().hidden_size if plain else hooks.d_in(model, hookpoint)
        if sae.config.d_in != width:
            made_on = f", made on {sae.config.model_name}," if sae.config.model_name else ""
            raise ValueError(
                f"saes[{hookpoint!r}] has d_in={sae.config.d_in}{made_on} and {type(model).__name__} has hidden "
                f"states of width d_model={width} there. Pass the model that the autoencoder was trained on."
            )


# ---- one batch after the other


@dataclass
class _Reader:
    model: PreTrainedModel
    saes: dict[str, SAE]
    pad_token: int
    top_k: int
    batch_size: int  # smaller after memory ran out
    hidden: bool

    def read(self, rows: Sequence[TokenRow], progress: bool = False) -> Reading:
        """All rows, the longest first: what does not fit in memory fails at once."""
        order = sorted(range(len(rows)), key=lambda row: -len(rows[row].input_ids))
        parts: list[Reading] = []
        start = 0
        with tqdm(total=len(rows), desc="Reading texts", disable=not progress) as bar:
            while start < len(order):
                part = self._try([rows[row] for row in order[start : start + self.batch_size]])
                if part is not None:
                    parts.append(part)
                    start += len(part)
                    bar.update(len(part))
        return Reading.concatenate(parts)[np.argsort(order)]

    def _try(self, batch: list[TokenRow]) -> Reading | None:
        """The batch, or `None` if memory ran out and a smaller one is to be tried."""
        try:
            with torch.no_grad(), evaluating(self.model, *self.saes.values()):
                return self._batch(batch)
        except RuntimeError as error:
            if not is_out_of_memory(error) or len(batch) == 1:
                raise
            reason = str(error).split("\n")[0]
        # Out of the except block nothing holds the tensors of the failed forward any more.
        free_cached_memory()
        self.batch_size = len(batch) // 2
        message = (
            "out of memory at %d texts of up to %d tokens at once (%s); going on with %d. Pass that as batch_size."
        )
        logger.warning(message, len(batch), len(batch[0].input_ids), reason, self.batch_size)
        return None

    def _batch(self, batch: list[TokenRow]) -> Reading:
        ids, mask = padded([row.input_ids for row in batch], self.pad_token, "right", self.model.device)
        options = forward_options(hooks.base_model(self.model), mask)
        states = hooks.run(self.model, self.saes, ids, **options)
        inside = torch.zeros(ids.shape, dtype=torch.bool)
        for place, row in enumerate(batch):
            inside[place, row.begin : row.end] = True
        lengths = np.array([row.end - row.begin for row in batch], np.int64)
        text_offsets = np.concatenate([[0], np.cumsum(lengths)])
        found, pooled, hidden = {}, {}, {kind: {} for kind in HIDDEN}
        for hookpoint, state in states.items():
            sae, tokens = self.saes[hookpoint], state[inside.to(state.device)]  # [N, D], text after text
            latents = sae.encode_sparse(tokens.to(sae.W_enc.device)).nonzero()
            indices, offsets = latents.indices.cpu().numpy(), latents.offsets.cpu().numpy()
            values = latents.values.float().cpu().numpy()
            found[hookpoint] = top_hypotheses(indices, values, offsets, text_offsets, self.top_k)
            pooled[hookpoint] = _max_pool(indices, values, offsets, text_offsets, sae.config.d_sae)
            if self.hidden:
                by_text = tokens.float().cpu().split(lengths.tolist())
                hidden["last"][hookpoint] = _stacked([text[-1] for text in by_text])
                hidden["mean"][hookpoint] = _stacked([text.mean(0) for text in by_text])
        spans = np.array([(row.begin + row.dropped, row.end + row.dropped) for row in batch], np.int64)
        return Reading(Hypotheses.from_layers(found, lengths), pooled, spans, hidden if self.hidden else {})


def _max_pool(
    indices: np.ndarray, values: np.ndarray, offsets: np.ndarray, text_offsets: np.ndarray, d_sae: int
) -> csr_matrix:
    """Largest activation of each feature over each text's tokens, `[T, F]`."""
    counts = np.diff(offsets[text_offsets])  # latents of each text
    keys = np.repeat(np.arange(len(counts)), counts) * d_sae + indices
    keys, values = keys[values > 0], values[values > 0]
    order = np.argsort(keys, kind="stable")
    keys, values = keys[order], values[order]
    starts = np.flatnonzero(np.diff(keys, prepend=-1))
    largest = np.maximum.reduceat(values, starts) if len(starts) else values
    return _scipy_sparse().csr_matrix((largest, np.divmod(keys[starts], d_sae)), shape=(len(counts), d_sae))


def _cut(row: TokenRow, limit: int, skip_first: int, bos: int | None) -> TokenRow:
    """The last `limit` tokens; a beginning-of-text token stays where it is."""
    dropped = len(row.input_ids) - limit
    if dropped <= 0:
        return row
    kept_first = 1 if bos is not None and row.input_ids[0] == bos else 0
    ids = row.input_ids[:kept_first] + row.input_ids[kept_first + dropped :]
    begin = max(row.begin - dropped, skip_first, kept_first)
    return TokenRow(ids, begin, row.end - dropped, dropped)


def _stacked(rows: Sequence[Tensor]) -> np.ndarray:
    return torch.stack(list(rows)).numpy()


def _scipy_sparse() -> Any:
    try:
        from scipy import sparse
    except ImportError as error:
        raise ImportError("Reading texts needs scipy: pip install 'hf_gradtools[ghosttrack]'.") from error
    return sparse
