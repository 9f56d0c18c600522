"""Names of the model's parts: a variant is one class under one decorator.

```python
@register("norm", "l1norm")
class L1Norm(Component): ...
```
makes `NanoGPTConfig(norm_variant_attn="l1norm")` valid. Nothing else has to know of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor, nn

from .costs import Ops


KINDS = ("attention", "mlp", "norm", "activation", "softmax", "position", "linear")
VARIANTS: dict[str, dict[str, Callable[..., nn.Module]]] = {kind: {} for kind in KINDS}

Class = TypeVar("Class", bound=Callable[..., nn.Module])


def register(kind: str, name: str) -> Callable[[Class], Class]:
    """Decorator that makes a class known as a variant of the model's part `kind`.

    Args:
        kind (`str`): one of `KINDS`. Constructors are called with `(config, layer_idx)`; norms with `(config, size)`;
            softmaxes with `(config, layer_idx, n_head)`; linears with `(config, in_features, out_features, bias)`.
        name (`str`): what the configuration calls it.

    Raises:
        ValueError: the kind is unknown, or another class has the name.
    """
    if kind not in VARIANTS:
        raise ValueError(f"kind={kind!r} is unknown. Pass one of {', '.join(KINDS)}.")

    def add(cls: Class) -> Class:
        known = VARIANTS[kind].get(name)
        # The same file is imported twice when a model's own copy of it is loaded with trust_remote_code.
        if known is not None and getattr(known, "__qualname__", None) != getattr(cls, "__qualname__", None):
            raise ValueError(f"{kind} variant {name!r} exists already, as {known}. Register {cls} by another name.")
        VARIANTS[kind][name] = cls
        return cls

    return add


def variant(kind: str, name: str) -> Callable[..., nn.Module]:
    """The class registered under a name.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    try:
        return VARIANTS[kind][name]
    except KeyError:
        known = ", ".join(sorted(VARIANTS[kind]))
        raise ValueError(f"{kind} variant {name!r} is unknown. Known: {known}.") from None


class Component(nn.Module):
    """A part of the model: knows how its own parameters begin and how many operations it takes."""

    dropout = 0.0

    def drop(self, x: Tensor) -> Tensor:
        """Dropout with probability `self.dropout`, of no cost where it does nothing."""
        return nn.functional.dropout(x, self.dropout) if self.training and self.dropout else x

    def init_parameters(self) -> None:
        """Sets the parameters that belong to this module itself, by functions of `transformers.initialization`.

        Those leave alone what was loaded from a checkpoint, which plain `torch.nn.init` would overwrite.
        """

    def ops(self, tokens: int, pairs: int = 0) -> Ops:
        """Operations of this part, with those of what it is made of.

        Args:
            tokens (`int`): vectors that go through; numbers, for an activation; rows of scores, for a softmax.
            pairs (`int`): (query, key) pairs of one head among which attention is computed; scores, for a softmax.
        """
        raise NotImplementedError(f"{type(self).__name__} does not count its operations: define ops(tokens, pairs)")
