"""Several checkpoints at once: scores are weighted sums over them, as in TracIn and LESS."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .search import Searchable
from .store import GradientStore


class GradientEnsemble(Searchable):
    """Stores of the same samples at several checkpoints, searched as one.

    Args:
        stores: one for each checkpoint, of the same samples in the same order.
        weights: of each store's scores, as given. Default the learning rates that the stores record in
            `extra["learning_rate"]`, divided by their sum.

    Raises:
        ValueError: there is no store, samples differ, or weights are missing.

    Source: Pruthi et al., TracIn, arXiv 2002.08484, eq. 2; Xia et al., LESS, arXiv 2402.04333, eq. 3.
    """

    def __init__(self, stores: Sequence[GradientStore], weights: Sequence[float] | None = None) -> None:
        self._stores = list(stores)
        if not self._stores:
            raise ValueError("stores is empty; pass at least one GradientStore.")
        first = self._stores[0]
        for number, store in enumerate(self._stores[1:], start=1):
            if not np.array_equal(store.sample_ids, first.sample_ids):
                raise ValueError(
                    f"stores[{number}] ({len(store)} rows) has other sample_ids than stores[0] ({len(first)} rows). "
                    "Project the same dataset at each checkpoint."
                )
        self._weights = self._learning_rates() if weights is None else [float(weight) for weight in weights]
        if len(self._weights) != len(self._stores) or not np.isfinite(self._weights).all():
            raise ValueError(f"weights={self._weights}; pass a finite number for each of {len(self._stores)} stores.")

    @property
    def stores(self) -> list[GradientStore]:
        """The stores, of one checkpoint each."""
        return self._stores

    @property
    def weights(self) -> list[float]:
        """The weight of each store's scores."""
        return self._weights

    @property
    def sample_ids(self) -> np.ndarray:
        """`[N]` by row."""
        return self._stores[0].sample_ids

    def _learning_rates(self) -> list[float]:
        rates = [store.extra.get("learning_rate") for store in self._stores]
        if any(not isinstance(rate, (int, float)) or rate < 0 for rate in rates) or not sum(rates):
            raise ValueError(
                f"the stores record learning rates {rates}; pass weights=[...], or write the stores with "
                "extra={'learning_rate': ...}."
            )
        return [rate / sum(rates) for rate in rates]
