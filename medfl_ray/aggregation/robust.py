"""Robust rules: what takes the mean's place where some hospitals may be hostile or broken.

Distances, scores and iterations need the inner products of the updates alone, [n, n], which are summed over blocks of
values in float64; what a rule returns is then one weighted sum of the updates, or a statistic of each value on its
own. So no more than a block of all updates is ever in memory, and each rule is a pure function.

A weight is a hospital's public aggregation weight. Norm bounding and the geometric median honour it. The others count
every update once, because their proofs count hostile updates, not hostile patients: median, trimmed mean, Krum,
Multi-Krum, centered clipping.

Shapes: n updates, P values of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from medfl_ray.aggregation.strategies import ServerState
from medfl_ray.aggregation.updates import ROBUST_STATE, Updates
from medfl_ray.config.aggregation import RobustConfig
from medfl_ray.errors import UpdateRejected
from medfl_ray.params import Vector

Doubles = npt.NDArray[np.float64]
CENTER = ROBUST_STATE + "center"
BLOCK_VALUES = 2**22
"""Values of all updates that are converted to float64 at once: 32 MiB."""
SMOOTHING = 1e-6
"""nu of the smoothed Weiszfeld algorithm, as a share of the median distance to the mean."""
TOLERANCE = 1e-10
"""Iterations end where no update's share changes by more than this."""


class Combined(NamedTuple):
    """What takes the mean's place, [P], and what the rule keeps for the next round."""

    update: Vector
    state: Mapping[str, Vector]


class Rule(NamedTuple):
    """`apply(updates, config, last)` combines; `last` is the last aggregate [P], zeros at first.

    `fewest(f)` is how many updates the rule needs against f hostile ones, and `why` says so in words.
    """

    apply: Callable[[Updates, RobustConfig, Vector], Vector]
    fewest: Callable[[int], int]
    why: str


def num_hostile(config: RobustConfig, num_updates: int) -> int:
    """Return f: what the configuration says, else a fifth of the updates, and one at least of three and more."""
    if config.num_hostile is not None:
        return config.num_hostile
    return max(int(num_updates >= 3), num_updates // 5)


def why_too_few(config: RobustConfig, num_updates: int) -> str | None:
    """Return why a rule cannot work with so many updates, or None where it can."""
    rule, f = RULES[config.rule], num_hostile(config, num_updates)
    if num_updates >= max(1, rule.fewest(f)):
        return None
    return (
        f"aggregation.robust.rule {config.rule} needs {rule.why}: {max(1, rule.fewest(f))} updates with f={f} hostile "
        f"ones, and there are {num_updates}; ask more hospitals in a round, lower aggregation.robust.num_hostile, or "
        "use norm_bound"
    )


def combine(config: RobustConfig, updates: Updates, state: ServerState) -> Combined:
    """Combine the updates of a round by the rule that is configured.

    Raises:
      UpdateRejected: the rule needs more updates.
    """
    problem = why_too_few(config, len(updates))
    if problem is not None:
        raise UpdateRejected(problem)
    last = state.get(CENTER)
    if last is None or last.size != updates.size:
        last = np.zeros(updates.size, dtype=np.float32)
    combined = RULES[config.rule].apply(updates, config, last)
    return Combined(combined, {CENTER: combined} if config.rule == "centered_clipping" else {})


def norm_bound(updates: Updates, config: RobustConfig, last: Vector) -> Vector:
    """Return the weighted mean of updates that are shortened to the median of their norms, times norm_factor.

    Honours the weights. The bound is the unweighted median, so that a large hospital does not set it. A hostile update
    keeps its direction and loses its length: it moves the mean by its share of the weights times the bound, no more
    (Sun et al. 2019, arXiv:1911.07963, with the round's own median for the threshold).
    """
    norms = np.sqrt(squared_norms(updates))
    bound = config.norm_factor * float(np.median(norms))
    factors = np.minimum(1.0, bound / np.maximum(norms, np.finfo(np.float64).tiny))
    return weighted_sum(updates, factors * updates.weights / updates.weights.sum())


def coordinate_median(updates: Updates, config: RobustConfig, last: Vector) -> Vector:
    """Return the median of each value (Yin et al. 2018, arXiv:1803.01498); unweighted.

    Of an even number of updates it is the mean of the middle two.
    """
    return per_value(updates, lambda block: np.median(block, axis=0))


def trimmed_mean(updates: Updates, config: RobustConfig, last: Vector) -> Vector:
    """Return the mean of each value without its f largest and f smallest (Yin et al. 2018); unweighted."""
    n, f = len(updates), num_hostile(config, len(updates))

    def trimmed(block: Doubles) -> Doubles:
        mean: Doubles = np.sort(block, axis=0)[f : n - f].mean(axis=0)
        return mean

    return per_value(updates, trimmed)


def geometric_median(updates: Updates, config: RobustConfig, last: Vector) -> Vector:
    """Return the point with the least weighted sum of distances to the updates; honours the weights.

    Smoothed Weiszfeld algorithm from the weighted mean (RFA, Pillutla et al. 2022, arXiv:1912.13445). A median of
    weights: a hospital with half of all weight or more decides alone.
    """
    products, alphas = inner_products(updates), updates.weights / updates.weights.sum()
    shares = alphas
    smoothing = SMOOTHING * float(np.median(distances_to(products, shares)))
    for _ in range(config.iterations):
        pull = alphas / np.maximum(distances_to(products, shares), max(smoothing, np.finfo(np.float64).tiny))
        shares, before = pull / pull.sum(), shares
        if np.abs(shares - before).max() < TOLERANCE:
            break
    return weighted_sum(updates, shares)


def krum(updates: Updates, config: RobustConfig, last: Vector) -> Vector:
    """Return the update that lies closest to its n - f - 2 nearest others (Blanchard et al. 2017); unweighted.

    Source: arXiv:1703.02757. Of equal scores the first by the hospital's name wins.
    """
    chosen = np.zeros(len(updates))
    chosen[np.argmin(krum_scores(updates, num_hostile(config, len(updates))))] = 1.0
    return weighted_sum(updates, chosen)


def multi_krum(updates: Updates, config: RobustConfig, last: Vector) -> Vector:
    """Return the mean of the n - f updates with the best Krum scores (Blanchard et al. 2017); unweighted."""
    n, f = len(updates), num_hostile(config, len(updates))
    chosen = np.zeros(n)
    chosen[np.argsort(krum_scores(updates, f), kind="stable")[: n - f]] = 1 / (n - f)
    return weighted_sum(updates, chosen)


def krum_scores(updates: Updates, f: int) -> Doubles:
    """Return each update's sum of squared distances to its n - f - 2 nearest others, [n]; at least one other."""
    products = inner_products(updates)
    own = np.diagonal(products)
    squares = np.maximum(own[:, None] + own[None, :] - 2 * products, 0.0)
    np.fill_diagonal(squares, np.inf)
    scores: Doubles = np.sort(squares, axis=1)[:, : max(1, len(updates) - f - 2)].sum(axis=1)
    return scores


def centered_clipping(updates: Updates, config: RobustConfig, last: Vector) -> Vector:
    """Return the last aggregate moved by the mean of the differences to it, each clipped; unweighted.

    Repeated `iterations` times. The radius is fixed where one is configured, else the median distance of the updates,
    measured again in each iteration (Karimireddy et al. 2021, arXiv:2012.10333, which fixes it).
    """
    n = len(updates)
    products = inner_products(updates, last)
    center = np.append(np.zeros(n), 1.0)  # shares of the updates, and of the last aggregate
    for _ in range(config.iterations):
        distances = distances_to(products, center)[:n]
        radius = config.clipping_radius if config.clipping_radius is not None else float(np.median(distances))
        factors = np.minimum(1.0, radius / np.maximum(distances, np.finfo(np.float64).tiny)) / n
        before = center
        center = (1 - factors.sum()) * before + np.append(factors, 0.0)
        if np.abs(center - before).max() < TOLERANCE:
            break
    return weighted_sum(updates, center[:n], last, float(center[n]))


RULES: dict[str, Rule] = {
    "norm_bound": Rule(norm_bound, lambda f: 2 * f + 1, "more than 2f updates"),
    "median": Rule(coordinate_median, lambda f: 2 * f + 1, "more than 2f updates"),
    "trimmed_mean": Rule(trimmed_mean, lambda f: 2 * f + 1, "more than 2f updates"),
    "geometric_median": Rule(geometric_median, lambda f: 2 * f + 1, "more than 2f updates"),
    "krum": Rule(krum, lambda f: 2 * f + 3, "2f + 3 updates"),
    "multi_krum": Rule(multi_krum, lambda f: 2 * f + 3, "2f + 3 updates"),
    "centered_clipping": Rule(centered_clipping, lambda f: 2 * f + 1, "more than 2f updates"),
}


def blocks(updates: Updates) -> Iterator[tuple[slice, Doubles]]:
    """Yield the values of all updates block by block: where they belong, and [n, block] in float64."""
    step = max(1, min(updates.block_size, BLOCK_VALUES // max(1, len(updates))))
    for start in range(0, updates.size, step):
        where = slice(start, min(start + step, updates.size))
        yield where, updates.rows(where.start, where.stop).astype(np.float64)


def per_value(updates: Updates, statistic: Callable[[Doubles], Doubles]) -> Vector:
    """Return a statistic of every value over the updates, [P]; it maps [n, block] to [block]."""
    result = np.empty(updates.size, dtype=np.float32)
    for where, block in blocks(updates):
        result[where] = statistic(block)
    return result


def squared_norms(updates: Updates) -> Doubles:
    """Return each update's squared Euclidean norm, [n]."""
    squares = np.zeros(len(updates))
    for _, block in blocks(updates):
        squares += np.einsum("np,np->n", block, block)
    return squares


def inner_products(updates: Updates, last: Vector | None = None) -> Doubles:
    """Return the inner products of the updates with one another, [n, n]; with `last` [P] as one more, [n+1, n+1].

    All are taken from the updates' mean, which leaves distances as they are and loses fewer digits.
    """
    count = len(updates) + (last is not None)
    products = np.zeros((count, count))
    for where, block in blocks(updates):
        rows = block if last is None else np.vstack([block, last[None, where].astype(np.float64)])
        rows -= block.mean(axis=0)
        products += rows @ rows.T
    return products


def distances_to(products: Doubles, shares: Doubles) -> Doubles:
    """Return the distance of every vector to the one with these shares of them, which add up to 1, [n]."""
    squares = np.diagonal(products) - 2 * products @ shares + shares @ products @ shares
    distances: Doubles = np.sqrt(np.maximum(squares, 0.0))
    return distances


def weighted_sum(updates: Updates, shares: Doubles, last: Vector | None = None, share_of_last: float = 0.0) -> Vector:
    """Return the sum of shares[i] * update i, and of `last` times its own share, [P]."""
    result = np.empty(updates.size, dtype=np.float32)
    for where, block in blocks(updates):
        own = np.einsum("n,np->p", shares, block)
        result[where] = own if last is None else own + share_of_last * last[where]
    return result
