"""Which texts are near one of a set of texts: exact Jaccard similarity of word n-gram sets, found without all pairs."""

import math
from collections import Counter
from collections.abc import Iterable

from pipeline.text.normalise import normalise, tokens

_SLACK = 1e-9  # keeps rounding from shortening a prefix; the similarity itself is computed exactly


def shingles(text: str, ngram: int) -> frozenset[str]:
    """The token n-grams of the normalised text; the whole of it as the only one when it has fewer tokens."""
    found = tokens(normalise(text))
    if len(found) < ngram:
        return frozenset({"\0" + " ".join(found)})
    return frozenset(map(" ".join, zip(*(found[start:] for start in range(ngram)), strict=False)))


class NearIndex:
    """Finds whether a text's Jaccard similarity to one of the indexed texts reaches a threshold; exact.

    Prefix filtering (Chaudhuri, Ganti, Kaushik 2006; Bayardo, Ma, Srikant 2007): two sets with Jaccard similarity t
    share an element among the first |x| - ceil(t |x|) + 1 of each, in any one order. Rarest first, phrases that all
    texts share hardly ever lie in a prefix, so few pairs are compared.

    Texts without any token (blank, say) are near each other.
    """

    def __init__(self, texts: Iterable[str], *, ngram: int, threshold: float) -> None:
        self._ngram, self._threshold = ngram, threshold
        sets = list(dict.fromkeys(shingles(text, ngram) for text in texts))
        counts = Counter(shingle for shingle_set in sets for shingle in shingle_set)
        rarest_first = sorted(counts, key=lambda shingle: (counts[shingle], shingle))
        self._rank = {shingle: rank for rank, shingle in enumerate(rarest_first)}
        self._sets = [frozenset(self._rank[shingle] for shingle in shingle_set) for shingle_set in sets]
        self._holders: dict[int, list[int]] = {}
        for number, ranks in enumerate(self._sets):
            for rank in sorted(ranks)[: self._prefix(len(ranks))]:
                self._holders.setdefault(rank, []).append(number)

    def is_near(self, text: str) -> bool:
        """Whether one of the indexed texts has a similarity to `text` of at least the threshold."""
        own = shingles(text, self._ngram)
        known = {self._rank[shingle] for shingle in own if shingle in self._rank}
        if len(known) < self._threshold * len(own) - _SLACK:
            return False
        # Shingles that no indexed text has are the rarest of all: they come first and use up the prefix.
        prefix = self._prefix(len(own)) - (len(own) - len(known))
        seen: set[int] = set()
        for rank in sorted(known)[: max(0, prefix)]:
            for number in self._holders.get(rank, ()):
                if number not in seen and self._reaches(known, len(own), self._sets[number]):
                    return True
                seen.add(number)
        return False

    def _prefix(self, size: int) -> int:
        return size - math.ceil(self._threshold * size - _SLACK) + 1

    def _reaches(self, known: set[int], size: int, other: frozenset[int]) -> bool:
        if min(size, len(other)) < self._threshold * max(size, len(other)) - _SLACK:
            return False
        shared = len(known & other)
        return shared / (size + len(other) - shared) >= self._threshold
