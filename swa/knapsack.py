"""One choice for each layer, the most valuable that a limit allows: exactly."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]


def knapsack(value: F64, price: F64, limit: float) -> tuple[int, ...]:
    """The choice of each layer that maximises the sum of values within a sum of prices.

    A dynamic programme over layers that keeps, of all sums so far, those that no other beats in
    both price and value: exact for any prices, and quick where most layers have the same.

    Args:
        value: [L, C], of each choice.
        price: [L, C]; the cheapest of each layer must fit together.
        limit: of the sum of prices.

    Returns:
        [L] choices; of equal sums the cheaper, then the lower choices in the first layers.
    """
    prices, values = np.zeros(1), np.zeros(1)
    origins: list[tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]] = []
    least = np.concatenate([np.cumsum(price.min(axis=1)[::-1])[::-1][1:], [0.0]])
    for layer in range(len(value)):
        sums = (prices[:, None] + price[layer]).ravel()
        gains = (values[:, None] + value[layer]).ravel()
        order = np.lexsort((np.arange(len(sums)), -gains, sums))
        order = order[sums[order] + least[layer] <= limit]  # what is left must fit, too
        best = np.maximum.accumulate(gains[order])
        kept = order[np.concatenate([[True], gains[order][1:] > best[:-1]])]
        origins.append((kept // value.shape[1], kept % value.shape[1]))
        prices, values = sums[kept], gains[kept]
    place, choices = int(np.argmax(values)), []
    for before, choice in reversed(origins):
        choices.append(int(choice[place]))
        place = int(before[place])
    return tuple(reversed(choices))
