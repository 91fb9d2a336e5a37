"""Settings of the networks: the VAEs and the DiT. No torch here, so that job files validate quickly."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from scldm.config import StrictModel

InputMode = Literal["count_aware", "log1p", "log1pzero", "sqrt", "anscombe", "proj", "projconcat", "softbin"]
Head = Literal["nb_shared", "nb_cell", "gaussian"]


class VAEConfig(StrictModel):
    """The transformer VAE: a set of gene counts to a few latent tokens, and back."""

    d_model: PositiveInt = 32
    """Width of the transformer."""
    n_layers: int = Field(2, ge=0)
    """Self-attention blocks in the encoder, and as many in the decoder."""
    n_heads: PositiveInt = 4
    """Heads of the self-attention blocks."""
    n_heads_cross: PositiveInt = 4
    """Heads of the two cross-attention blocks (genes to latents, latents to genes)."""
    n_latent_tokens: PositiveInt = 16
    """Latent tokens of a cell (m)."""
    latent_width: PositiveInt = 16
    """Width of a latent token (e)."""
    input: InputMode = "count_aware"
    """How a count enters the encoder. All but count_aware are upstream's, for its checkpoints and for comparison."""
    head: Head = "nb_shared"
    """Likelihood: negative binomial with one theta per gene, or per cell and gene; or a Gaussian on log1p(CP10k)."""
    shared_embedding: bool = True
    """Whether the decoder's queries are the encoder's gene embeddings."""
    gene_bias: bool = True
    """A logit per gene, started at the log of its share of the training counts. Upstream has none."""
    adaln: bool = False
    """Whether a condition vector of the cell modulates the decoder's norms (a variant of upstream's)."""
    zero_positions: bool = False
    """A frozen positional parameter on the latent tokens of the encoder, as some upstream checkpoints have."""
    bias: bool = False
    """Biases in attention and latent projections."""
    multiple_of: PositiveInt = 4
    """The SwiGLU's hidden width, 8 d / 3, is rounded up to a multiple of this."""
    eps: PositiveFloat = 1e-8
    """LayerNorm epsilon."""
    temperature: PositiveFloat = 1.0
    """Softmax temperature of the gene proportions."""
    genes_seq_len: PositiveInt | None = None
    """Set only for upstream's checkpoints: its unmasked pads fill every cell up to this many tokens."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> VAEConfig:
        for field in ("n_heads", "n_heads_cross"):
            if self.d_model % getattr(self, field):
                raise ValueError(f"d_model ({self.d_model}) must be a multiple of {field} ({getattr(self, field)})")
        return self

    @model_validator(mode="after")
    def _gaussian_has_no_gene_bias(self) -> VAEConfig:
        if self.head == "gaussian" and self.gene_bias:
            raise ValueError("gene_bias (true) is a logit of gene proportions; head gaussian has none: set it to false")
        return self


class ScviConfig(StrictModel):
    """The MLP VAE that upstream compares with, after scVI (Lopez et al. 2018)."""

    n_hidden: PositiveInt = 128
    """Width of the hidden layers."""
    n_layers: PositiveInt = 1
    """Hidden layers of the encoder, and as many of the decoder."""
    n_latent: PositiveInt = 10
    """Width of the latent."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Share of hidden units left out in training."""
    shared_theta: bool = True
    """One inverse dispersion per gene, or one per cell and gene."""
    kl_weight: float = Field(1.0, ge=0)
    """Weight of the KL term relative to the likelihood."""


class DiTConfig(StrictModel):
    """The diffusion transformer that moves noise to latents."""

    d_model: PositiveInt = 128
    """Width of the transformer."""
    n_layers: PositiveInt = 4
    """adaLN-zero blocks."""
    n_heads: PositiveInt = 4
    """Attention heads."""
    label_dropout: float = Field(0.1, ge=0, lt=1)
    """Fraction of cells trained without labels, so that guidance has an unconditional field to push against."""
    strategy: Literal["joint", "mutually_exclusive"] = "joint"
    """joint: the embeddings of all labels are added. mutually_exclusive: one label at a time (upstream's default)."""
    bias: bool = True
    """Biases in attention."""
    multiple_of: PositiveInt = 4
    """The SwiGLU's hidden width, 8 d / 3, is rounded up to a multiple of this."""
    eps: PositiveFloat = 1e-8
    """LayerNorm epsilon."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> DiTConfig:
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model ({self.d_model}) must be a multiple of n_heads ({self.n_heads})")
        return self
