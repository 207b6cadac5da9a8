"""In which proportions corpora are mixed: the weights of --data, and the pattern that follows."""

import math
import os

import numpy as np

from support.script import require

MOST_SAMPLES = 1000  # in one repetition of the pattern


def parse_data(values: tuple[str, ...]) -> list[tuple[tuple[str, ...], float]]:
    """What the values of --data stand for: for each corpus the paths that make it up, and a weight.

    `code=0.2 books/=0.8` are two corpora. Paths without weights, such as `books/*.txt`, are one. A
    path that exists is a path, whatever is in its name.
    """
    weighted = {}
    unweighted = []
    for value in values:
        path, weight = _path_and_weight(value)
        if weight is None:
            unweighted.append(value)
            continue
        require(
            0 < weight < math.inf,
            f"--data {value}; expected a weight above 0; leave this corpus out",
        )
        require(
            path not in weighted,
            f"--data names {path} twice; expected each corpus once; add its weights",
        )
        weighted[path] = weight
    if not weighted:
        return [(tuple(unweighted), 1.0)]
    require(
        not unweighted,
        f"--data {' '.join(unweighted)} has no weight, while other corpora have one; expected a "
        "weight for each corpus or for none; write PATH=WEIGHT, such as code=0.2",
    )
    return [((path,), weight) for path, weight in weighted.items()]


def _path_and_weight(value: str) -> tuple[str, float | None]:
    path, _, number = value.rpartition("=")
    if not path or os.path.exists(value):
        return value, None
    try:
        return path, float(number)
    except ValueError:
        return value, None


def pattern(weights: list[float]) -> np.ndarray:
    """The corpus of each of P samples, int64 (P,); repeated without end it keeps the proportions.

    After any number of samples each corpus has had its share of them, to less than one sample.
    """
    counts = _whole_numbers(weights)
    require(
        counts.min() > 0,
        f"--data with the weights {', '.join(map(str, weights))}; expected each to be at least "
        f"1/{MOST_SAMPLES} of their sum; raise the smallest, or leave it out",
    )
    return _dealt_out(counts)


def _whole_numbers(weights: list[float]) -> np.ndarray:
    """Whole numbers in the proportions of the weights, int64 (corpora,).

    Of all sums up to MOST_SAMPLES the one is taken that comes nearest, and the smallest of equals.
    """
    shares = np.array(weights) / np.sum(weights)
    best = None
    smallest_error = math.inf
    for total in range(1, MOST_SAMPLES + 1):
        ends = np.rint(total * np.cumsum(shares))
        counts = np.diff(ends, prepend=0).astype(np.int64)
        error = np.abs(counts / total - shares).max()
        if error < smallest_error - 1e-12:
            best = counts
            smallest_error = error
    return best


def _dealt_out(counts: np.ndarray) -> np.ndarray:
    """Which corpus has which of P samples, if corpus i has counts[i] of them, int64 (P,).

    The j-th sample of a corpus with n of P, from 0, belongs between jP/n and (j+1)P/n. Of the
    corpora whose next sample may come, that one has its turn whose sample must come first. It is
    always in time, so no corpus is ever a whole sample away from its share (Baruah et al. 1996,
    "Proportionate progress: a notion of fairness in resource allocation").
    """
    P = int(counts.sum())
    given = np.zeros_like(counts)
    corpora = []
    for place in range(P):
        may_come = given * P < (place + 1) * counts
        latest = -(-(given + 1) * P // counts)  # (j+1)P/n, rounded up
        corpus = int(np.where(may_come, latest, P + 1).argmin())
        given[corpus] += 1
        corpora.append(corpus)
    return np.array(corpora)
