"""One autoencoder's two files, written so that they stay together.

`cfg.json` and `sae_weights.safetensors` are SAELens' format. Our block of `cfg.json` also holds the weights' checksum,
which makes the two one: new weights wait beside the old ones, the new `cfg.json` replaces the old, and then the new
weights replace theirs. Whoever is killed in between leaves the old pair, or the new one with its last step to be done
by the next reader.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import safetensors.torch

from hf_gradtools.core.atomic import as_json_bytes, atomic_write
from hf_gradtools.sae.formats import CONFIG_FILE, WEIGHTS_FILE, to_saelens
from hf_gradtools.sae.formats.saelens import BLOCK
from hf_gradtools.sae.modeling_sae import SAE


__all__ = ["WAITING_FILE", "check_pair", "our_block", "write_pair"]

WAITING_FILE = f"{WEIGHTS_FILE}.next"  # weights whose cfg.json is about to appear, or just has
CHECKSUM = "weights_sha256"  # in our block


def write_pair(sae: SAE, folder: Path) -> None:
    """Writes an autoencoder's two files; after a kill, the folder holds the old ones or the new ones.

    Raises:
        ValueError: its configuration holds what JSON cannot, or its tensors have several types.
    """
    cfg, tensors = to_saelens(sae.config.to_dict(), sae.state_dict())
    weights = safetensors.torch.save({name: tensor.cpu() for name, tensor in tensors.items()}, {"format": "pt"})
    cfg[BLOCK][CHECKSUM] = hashlib.sha256(weights).hexdigest()
    try:
        config = as_json_bytes(cfg)
    except (TypeError, ValueError) as error:
        raise ValueError(f"sae.config is not fit for JSON: {error}. Keep numbers and texts in metadata.") from error
    folder.mkdir(parents=True, exist_ok=True)
    _finish(folder)  # else new weights would take the place of those that an earlier save left waiting
    with atomic_write(folder / WAITING_FILE) as file:
        file.write(weights)
    with atomic_write(folder / CONFIG_FILE) as file:
        file.write(config)
    _finish(folder)


def check_pair(folder: Path) -> None:
    """Does the last step of a save that was killed, and refuses weights that are not those of `cfg.json`.

    Raises:
        ValueError: the weights have another checksum than `cfg.json` says, if it says one: only ours does.
    """
    _finish(folder)
    wanted, file = our_block(folder / CONFIG_FILE).get(CHECKSUM), folder / WEIGHTS_FILE
    if wanted is not None and file.exists() and _sha256(file) != wanted:
        raise ValueError(
            f"{file} is damaged, or not the file that {CONFIG_FILE} beside it was saved with: its sha256 is another. "
            f"Copy or download both again; if you changed it on purpose, remove {CHECKSUM!r} from {CONFIG_FILE}."
        )


def our_block(file: Path) -> dict[str, Any]:
    """What a `cfg.json` holds for us; nothing if it is another library's, or no whole file, which its reader tells."""
    try:
        cfg = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    block = cfg.get(BLOCK) if isinstance(cfg, dict) else None
    return block if isinstance(block, dict) else {}


def _finish(folder: Path) -> None:
    """Gives waiting weights their name, if `cfg.json` is theirs already."""
    waiting = folder / WAITING_FILE
    if waiting.exists() and our_block(folder / CONFIG_FILE).get(CHECKSUM) == _sha256(waiting):
        with contextlib.suppress(FileNotFoundError):  # another reader was faster
            os.replace(waiting, folder / WEIGHTS_FILE)


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while part := opened.read(2**22):
            digest.update(part)
    return digest.hexdigest()
