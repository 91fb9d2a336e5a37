"""Choice of the genes that the encoder sees. No torch here, so that job files validate quickly."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveInt, model_validator

from scldm.config import StrictModel

GeneMode = Literal["expressed", "all", "none", "random", "weighted", "random_expressed", "expressed_zero"]
NEEDS_N = ("random", "weighted", "random_expressed", "expressed_zero")


class GenesSeenConfig(StrictModel):
    """Genes that the encoder sees of a cell."""

    mode: GeneMode = "expressed"
    """expressed: those with a count, all of them. all, or none (no sampling, upstream's word): every gene, zeros too.
    random: n genes of the vocabulary. weighted: n genes, likelier the more a cell exceeds the mean of the gene.
    random_expressed: at most n genes with a count. expressed_zero: at most n genes with a count, then genes without,
    up to n together."""
    n: PositiveInt | None = None
    """Genes seen at most; for the modes that draw."""

    @model_validator(mode="after")
    def _n_where_it_is_drawn(self) -> GenesSeenConfig:
        if (self.n is None) == (self.mode in NEEDS_N):
            say = "needs n" if self.n is None else f"takes no n ({self.n})"
            raise ValueError(f"mode {self.mode} {say}; the modes that draw n genes are {', '.join(NEEDS_N)}")
        return self
