"""The shipped template, filled in for a model."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from hf_gradtools.ghosttrack.settings.configuration import find_config


if TYPE_CHECKING:
    from transformers import PreTrainedConfig


__all__ = ["template_for"]

FEATURES_PER_DIMENSION = 8


def template_for(name: str, hf_config: PreTrainedConfig | None = None) -> str:
    """A configuration as text, with all keys and what they mean.

    Args:
        name (`str`): Hub id or folder of a causal LM.
        hf_config (`PreTrainedConfig`, *optional*): its configuration; read from there if not given.

    Returns:
        `str`: YAML for `GhostTrackConfig.from_yaml`.

    Raises:
        ValueError: there is no such model.
    """
    if hf_config is None:
        from transformers import AutoConfig

        from hf_gradtools.ghosttrack.phases.common import told_in_a_line

        with told_in_a_line(name):
            hf_config = AutoConfig.from_pretrained(name)
    width, depth = hf_config.get_text_config().hidden_size, hf_config.get_text_config().num_hidden_layers
    folder = re.sub(r"[^a-z0-9.-]+", "-", name.rstrip("/").rpartition("/")[2].lower()).strip("-.") or "model"
    text = find_config("template").read_text(encoding="utf-8")
    text = re.sub(r"(?m)^  # Some others:.*\n(?:  # .*\n)*", "", text)
    text = text.replace("my-model", folder)
    values = {
        "base_model": _quoted(name),
        "d_model": width,
        "n_layers": depth,
        "d_hidden": width * FEATURES_PER_DIMENSION,
    }
    for key, value in values.items():
        text = re.sub(rf"(?m)^(  {key}: )\S+", lambda match, value=value: f"{match[1]}{value}", text)
    return text


def _quoted(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z][\w./-]*", name) else "'" + name.replace("'", "''") + "'"
