"""How many tokens suit a model: scaling laws of loss in parameters and tokens.

N parameters, D tokens, C operations of training, about 6 N D. The loss is L = E + A / N^α + B / D^β (Chinchilla,
2203.15556, equation 2). For a given C it is least where N = G (C/6)^(β/(α+β)) and D = (C/6) / N, with
G = (αA / βB)^(1/(α+β)).
"""

from __future__ import annotations

from typing import NamedTuple


class ScalingLaw(NamedTuple):
    """The constants of one fit. They say how parameters and tokens trade against each other, not what loss a model will
    have: E belongs to that fit's text and tokenizer, and has no part in the trade."""

    source: str
    a: float
    b: float
    alpha: float
    beta: float

    def best_tokens(self, parameters: float) -> float:
        """The D with which N is the best use of the compute that both take."""
        return self._compute(parameters) / parameters

    def best_parameters(self, compute: float) -> float:
        """The N that is best for C operations."""
        return self._g * (compute / 6) ** self._exponent

    @property
    def _exponent(self) -> float:
        return self.beta / (self.alpha + self.beta)

    @property
    def _g(self) -> float:
        return float((self.alpha * self.a / (self.beta * self.b)) ** (1 / (self.alpha + self.beta)))

    def _compute(self, parameters: float) -> float:
        """C/6 for which so many parameters are best."""
        return float((parameters / self._g) ** (1 / self._exponent))


REPLICATION = ScalingLaw("replication, 2404.10102", 482.01, 2085.43, 0.3478, 0.3658)
"""The fit of Chinchilla's own data done again; with the rounded constants of its abstract results move by a tenth."""
CHINCHILLA = ScalingLaw("Chinchilla, 2203.15556, as printed", 406.4, 410.7, 0.34, 0.28)
"""As printed in its approach 3, which is not consistent with its approaches 1 and 2."""
