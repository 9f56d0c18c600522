"""A batch of written memories: tensors and where they come from, saved and shared like a model."""

import copy
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, ModelCard, ModelCardData
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils.hub import cached_file


MEMORY_FILE = "gradmem_memory.safetensors"
NAMES = ("mem", "proj_weight", "proj_bias")  # of the tensors in the file


@dataclass(eq=False)
class GradMemory:
    """What a write makes of a batch of contexts.

    ```python
    memory = model.write(context_ids, attention_mask)
    memory.save_pretrained("my-memory")
    model.generate(query_ids, memory=GradMemory.from_pretrained("my-memory"))
    ```

    Args:
        mem (`Tensor`): `[B, M, E]`.
        proj_weight, proj_bias (`Tensor`, *optional*): `[B, E, E]` and `[B, E]`, each sample's own map of its memory,
            of models with `mem_proj_mode="per_sample"`.
        provenance (`list[dict]`): for each sample the model that wrote it ("model") and its writes ("writes"): steps
            K, learning rate, tokens, and the inner loss before each step.

    Raises:
        ValueError: the tensors do not fit together.
    """

    mem: Tensor
    proj_weight: Tensor | None = None
    proj_bias: Tensor | None = None
    provenance: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.mem.dim() != 3:
            raise ValueError(f"mem has the shape {tuple(self.mem.shape)}; it must be [samples, vectors, hidden size].")
        if (self.proj_weight is None) != (self.proj_bias is None):
            raise ValueError("proj_weight and proj_bias come together. Pass both or neither.")
        if any(len(tensor) != len(self) for tensor in self.fast):
            raise ValueError(f"tensors of {[len(tensor) for tensor in self.fast]} samples do not go together.")
        self.provenance = self.provenance or [{"model": None, "writes": []} for _ in range(len(self))]
        if len(self.provenance) != len(self):
            raise ValueError(f"provenance has {len(self.provenance)} entries for {len(self)} samples.")

    @property
    def fast(self) -> tuple[Tensor, ...]:
        """The tensors that writing changes."""
        return tuple(tensor for tensor in (self.mem, self.proj_weight, self.proj_bias) if tensor is not None)

    def __len__(self) -> int:
        return len(self.mem)

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> "GradMemory":
        """Some of the samples, by number, slice, numbers or mask; one of them is a batch of one."""
        rows = range(len(self))
        if isinstance(index, slice):
            return self._take(torch.tensor(rows[index], dtype=torch.long))
        if isinstance(index, int) and not isinstance(index, bool):
            return self._take(torch.tensor([rows[index]]))
        chosen = torch.as_tensor(index, device="cpu")
        if chosen.dim() != 1:
            raise TypeError(f"a memory is indexed by a number, a slice, numbers or a mask, not by {index!r}.")
        return self._take(torch.tensor(rows)[chosen if chosen.dtype == torch.bool else chosen.long()])

    def __iter__(self) -> Iterator["GradMemory"]:
        return (self[i] for i in range(len(self)))

    def repeat_interleave(self, repeats: int) -> "GradMemory":
        """Each sample `repeats` times in a row, as for several queries each."""
        return self._take(torch.arange(len(self)).repeat_interleave(repeats))

    def to(self, *args: Any, **kwargs: Any) -> "GradMemory":
        """On another device or in another type, as `Tensor.to`."""
        return GradMemory(*(tensor.to(*args, **kwargs) for tensor in self.fast), provenance=self.provenance)

    @classmethod
    def cat(cls, memories: Iterable["GradMemory"]) -> "GradMemory":
        """The samples of several memories of one model, as one batch."""
        memories = list(memories)
        if not memories:
            raise ValueError("there is no memory to put together. Pass a list of at least one.")
        shapes = {tuple(tensor.shape[1:] for tensor in memory.fast) for memory in memories}
        if len(shapes) > 1:
            raise ValueError(f"memories of different shapes {sorted(shapes)} do not go together; one model made each.")
        fast = [torch.cat(tensors) for tensors in zip(*(memory.fast for memory in memories), strict=True)]
        return cls(*fast, provenance=[entry for memory in memories for entry in memory.provenance])

    def _take(self, rows: Tensor) -> "GradMemory":
        fast = [tensor[rows.to(tensor.device)] for tensor in self.fast]
        return GradMemory(*fast, provenance=[copy.deepcopy(self.provenance[i]) for i in rows.tolist()])

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Writes `gradmem_memory.safetensors`, which appears whole or not at all, and a card.

        Args:
            save_directory: folder; made if absent.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.contiguous() for name, tensor in zip(NAMES, self.fast, strict=False)}
        temporary = folder / f".{MEMORY_FILE}.{os.getpid()}"
        save_file(tensors, temporary, metadata={"format": "pt", "provenance": json.dumps(self.provenance)})
        os.replace(temporary, folder / MEMORY_FILE)
        if not (folder / "README.md").exists():  # else it may be somebody's own
            self._card().save(folder / "README.md")

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload memory",
        create_pr: bool = False,
    ) -> str:
        """Uploads what `save_pretrained` writes, the card with this memory's figures included.

        Args:
            repo_id: on the Hub; made if absent.
            private: whether a new one is private.
            token, revision, commit_message, create_pr: as for `HfApi.upload_folder`.

        Returns:
            the commit's address.
        """
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            options = {"revision": revision, "commit_message": commit_message, "create_pr": create_pr}
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **options))

    @classmethod
    def from_pretrained(cls, pretrained_name_or_path: str | os.PathLike[str], **kwargs: Any) -> "GradMemory":
        """Reads what `save_pretrained` wrote, bit by bit.

        Args:
            pretrained_name_or_path: Hub id or folder.
            **kwargs: `revision`, `token`, `cache_dir` and the like, for the Hub.

        Raises:
            OSError: there is no memory.
            ValueError: the file is none of a memory.
        """
        path = cached_file(pretrained_name_or_path, MEMORY_FILE, **kwargs)
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            metadata = file.metadata() or {}
        if "provenance" not in metadata:
            raise ValueError(
                f"{path} does not tell where its tensors are from. Pass what GradMemory.save_pretrained wrote."
            )
        provenance = json.loads(metadata["provenance"])
        return cls(**tensors, provenance=provenance)

    def _card(self) -> ModelCard:
        samples, vectors, width = self.mem.shape
        models = sorted({entry["model"] or "a model without a name" for entry in self.provenance})
        data = ModelCardData(library_name="hf_gradtools", tags=["gradmem", "memory"])
        tokens = sum(write["tokens"] for entry in self.provenance for write in entry["writes"])
        lines = [f"| {i} | {_describe(entry['writes'])} |" for i, entry in enumerate(self.provenance[:20])]
        return ModelCard(
            f"---\n{data}\n---\n\n# GradMem memory\n\n{samples} memories of {vectors} vectors of size {width}, written"
            f" from {tokens} tokens by {', '.join(models)}. Only that model can read them.\n\n```python\n"
            "from hf_gradtools import GradMemory\n\nmemory = GradMemory.from_pretrained(...)\n"
            "model.generate(query_ids, memory=memory[0])\n```\n\n"
            "| memory | tokens: inner loss before each step |\n|---|---|\n" + "\n".join(lines) + "\n"
        )


def _describe(writes: list[dict[str, Any]]) -> str:
    parts = [f"{write['tokens']}: {', '.join(f'{loss:.3f}' for loss in write['inner_losses'])}" for write in writes]
    return "; then ".join(parts) or "nothing written"
