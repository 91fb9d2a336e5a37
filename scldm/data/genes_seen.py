"""Settings for the genes that the encoder sees. No torch here, so that job files validate quickly."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveInt, model_validator

from scldm.config import StrictModel

GeneMode = Literal[
    "expressed", "all", "none", "random", "weighted", "random_expressed", "expressed_zero", "share_expressed"
]
NEEDS_N = ("random", "weighted", "random_expressed", "expressed_zero")


class GenesSeenConfig(StrictModel):
    """Genes that the encoder sees of a cell."""

    mode: GeneMode = "expressed"
    """expressed: those with a count, all of them. all, or none (no sampling, upstream's word): every gene, zeros too.
    random: n genes of the vocabulary. weighted: n genes, likelier the more a cell exceeds the mean of the gene.
    random_expressed: at most n genes with a count. expressed_zero: at most n genes with a count, then genes without,
    up to n together. share_expressed: each gene with a count with probability `share`, meant against overfitting where
    cells are few."""
    n: PositiveInt | None = None
    """Genes seen at most; for the modes that draw."""
    share: float | None = Field(None, gt=0, lt=1)
    """Probability that a gene with a count is seen; for share_expressed. The gene of smallest draw is always seen."""

    @model_validator(mode="after")
    def _check_n(self) -> GenesSeenConfig:
        if (self.n is None) == (self.mode in NEEDS_N):
            problem = "needs n" if self.n is None else f"takes no n ({self.n})"
            raise ValueError(f"mode {self.mode} {problem}; the modes that draw n genes are {', '.join(NEEDS_N)}")
        return self

    @model_validator(mode="after")
    def _check_share(self) -> GenesSeenConfig:
        if (self.share is None) == (self.mode == "share_expressed"):
            problem = "needs a share, such as 0.7" if self.share is None else f"takes no share ({self.share})"
            raise ValueError(f"mode {self.mode} {problem}; share belongs to mode share_expressed")
        return self
