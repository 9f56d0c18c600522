"""Loads SAEs that we saved in real SAELens and compares what they compute with what ours did.

```
python tests/sae/check_in_saelens.py FOLDER EXPECTED.safetensors [FOLDER EXPECTED.safetensors ...]
```

Run by an interpreter with sae-lens; needs nothing of ours. The second file holds `inputs [N, D]`, `reconstruction
[N, D]` and, if given, `latents [N, F]`. Ends with status 1 at a difference above 1e-5.
"""

from __future__ import annotations

import sys

import torch
from sae_lens import SAE
from safetensors.torch import load_file


TOLERANCE = 1e-5


def largest_difference(folder: str, expected_file: str) -> float:
    sae, expected = SAE.load_from_disk(folder), load_file(expected_file)
    with torch.no_grad():
        latents = sae.encode(expected["inputs"])
        found = {"latents": latents, "reconstruction": sae.decode(latents)}
    names = [name for name in ("latents", "reconstruction") if name in expected]
    return max(float((found[name] - expected[name]).abs().max()) for name in names)


def main(arguments: list[str]) -> int:
    worst = 0.0
    for folder, expected_file in zip(arguments[::2], arguments[1::2], strict=True):
        difference = largest_difference(folder, expected_file)
        print(f"{folder}: largest difference {difference:.1e}")
        worst = max(worst, difference)
    return 0 if worst <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
