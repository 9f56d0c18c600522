"""A small model with a tokenizer of a few words, autoencoders on its layers, and texts for them."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_gradtools.ghosttrack.detection.configuration_detector import DetectorConfig
from hf_gradtools.ghosttrack.detection.detector import HallucinationDetector
from hf_gradtools.sae.configuration_sae import SAEConfig
from hf_gradtools.sae.modeling_sae import SAE


WIDTH, FEATURES, HOOKPOINTS = 32, 24, ("layers.0", "layers.1")
PROMPT = "Question : a b ? Answer :"
TEMPLATE = "Question : {question} ? Answer : {answer}"
WORDS = [*"abcdefghij", *"0123456789", "yes", "no"]


def load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def make_saes(activation: str = "topk", width: int = WIDTH) -> dict[str, SAE]:
    saes = {}
    for seed, hookpoint in enumerate(HOOKPOINTS):
        sae = SAE(SAEConfig(width, FEATURES, activation, k=5, hookpoint=hookpoint), seed=seed).eval()
        with torch.no_grad():
            sae.W_enc.mul_(40)  # so that activations are above what begins a track
        saes[hookpoint] = sae
    return saes


def make_texts(count: int, seed: int = 0) -> tuple[list[str], list[int], list[int], list[int]]:
    """Texts, answer starts, labels and groups; the answer is odd-looking ("no ...") where the label is 1."""
    generator = torch.Generator().manual_seed(seed)
    texts, starts, labels, groups = [], [], [], []
    for number in range(count):
        length = int(torch.randint(1, 7, (), generator=generator))
        words = [WORDS[int(i)] for i in torch.randint(0, 20, (length,), generator=generator)]
        label = number % 2
        words.append("no" if label else "yes")
        prompt = PROMPT + " c" * (number % 4)
        texts.append(f"{prompt} {' '.join(words)}")
        starts.append(len(prompt) + 1)
        labels.append(label)
        groups.append(number // 2)
    return texts, starts, labels, groups


def make_detector(folder: Path, maps: list | None = None, fit: bool = True, **options) -> HallucinationDetector:
    """A detector on the model in `folder`, fitted on 40 texts."""
    config = DetectorConfig(**{"model_name": str(folder), "prompt_template": TEMPLATE, **options})
    detector = HallucinationDetector(config, make_saes(), *load(folder), maps=maps)
    if fit:
        texts, starts, labels, groups = make_texts(40)
        detector.fit(detector.read(texts, starts, progress=False), labels, groups)
    return detector
