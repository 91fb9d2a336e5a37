"""Settings of the networks: the VAEs and the DiT. No torch here, so that job files validate quickly."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, SerializerFunctionWrapHandler, model_serializer, model_validator

from scldm.config import StrictModel

InputMode = Literal["count_aware", "log1p", "log1pzero", "sqrt", "anscombe", "proj", "projconcat", "softbin"]
Head = Literal["nb_shared", "nb_cell", "gaussian"]


class DecoderConfig(StrictModel):
    """Sizes of the VAE's decoder that differ from its encoder's; null takes the encoder's."""

    d_model: PositiveInt | None = None
    """Width of the decoder; another one than the encoder's needs shared_embedding: false."""
    n_layers: int | None = Field(None, ge=0)
    """Self-attention blocks of the decoder."""
    n_heads: PositiveInt | None = None
    """Heads of the decoder's self-attention blocks."""
    n_heads_cross: PositiveInt | None = None
    """Heads of the decoder's cross-attention block (latents to genes)."""
    bias: bool | None = None
    """Biases in the decoder's attention and latent projection."""
    multiple_of: PositiveInt | None = None
    """The hidden width of the decoder's SwiGLU is rounded up to a multiple of this."""
    eps: PositiveFloat | None = None
    """LayerNorm epsilon of the decoder."""
    head_eps: PositiveFloat | None = None
    """LayerNorm epsilon of a Gaussian head; null takes the decoder's."""


class VAEConfig(StrictModel):
    """The transformer VAE: a set of gene counts to a few latent tokens, and back."""

    d_model: PositiveInt = 32
    """Width of the transformer."""
    n_layers: int = Field(2, ge=0)
    """Self-attention blocks in the encoder, and as many in the decoder unless decoder.n_layers is set."""
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
    """A logit per gene, started at the log of its share of the training counts. Upstream has none, nor has a Gaussian
    head, for which the default is false."""
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
    decoder: DecoderConfig | None = None
    """Sizes of the decoder, if they differ from the encoder's."""

    @model_validator(mode="before")
    @classmethod
    def _default_of_a_gaussian_head(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("head") == "gaussian":
            return {"gene_bias": False, **given}
        return given

    @model_validator(mode="after")
    def _decoder_holds_differences_only(self) -> VAEConfig:
        """Drop what repeats the encoder's value, so that one network has one configuration and one version."""
        if self.decoder is not None:
            given = self.decoder.model_dump(exclude_none=True)
            inherited = {**self.model_dump(include=set(given)), "head_eps": given.get("eps", self.eps)}
            own = {name: value for name, value in given.items() if value != inherited[name]}
            object.__setattr__(self, "decoder", DecoderConfig(**own) if own else None)  # the model is frozen
        return self

    @model_validator(mode="after")
    def _heads_divide_width(self) -> VAEConfig:
        for side, config in (("", self), ("decoder.", self.for_decoder())):
            for field in ("n_heads", "n_heads_cross"):
                heads = getattr(config, field)
                if config.d_model % heads:
                    raise ValueError(f"{side}d_model ({config.d_model}) must be a multiple of {side}{field} ({heads})")
        return self

    @model_validator(mode="after")
    def _decoder_fits(self) -> VAEConfig:
        width = self.for_decoder().d_model
        if self.shared_embedding and width != self.d_model:
            raise ValueError(
                f"decoder.d_model ({width}) differs from d_model ({self.d_model}), so the two cannot share gene "
                "embeddings: set shared_embedding to false"
            )
        if self.head != "gaussian" and self.decoder is not None and self.decoder.head_eps is not None:
            raise ValueError(f"decoder.head_eps is of a gaussian head; head is {self.head}: leave it out")
        return self

    def for_decoder(self) -> VAEConfig:
        """Return the settings with the decoder's sizes in the place of the encoder's."""
        if self.decoder is None:
            return self
        own = self.decoder.model_dump(exclude_none=True, exclude={"head_eps"})
        return self.model_copy(update={**own, "decoder": None})

    @property
    def head_eps(self) -> float:
        """LayerNorm epsilon of a Gaussian head."""
        own = None if self.decoder is None else self.decoder.head_eps
        return self.for_decoder().eps if own is None else own

    @model_serializer(mode="wrap")
    def _without_an_unset_decoder(self, to_dict: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what is not set: models and runs from before the decoder had sizes keep their versions."""
        values: dict[str, Any] = to_dict(self)
        decoder = values.pop("decoder", None)
        own = {name: value for name, value in (decoder or {}).items() if value is not None}
        return {**values, "decoder": own} if own else values

    @model_validator(mode="after")
    def _gaussian_has_no_gene_bias(self) -> VAEConfig:
        if self.head == "gaussian" and self.gene_bias:
            raise ValueError("gene_bias (true) is a logit of gene proportions; head gaussian has none: set it to false")
        return self


class ScviDecoderConfig(StrictModel):
    """Sizes of the MLP VAE's decoder that differ from its encoder's; null takes the encoder's."""

    n_hidden: PositiveInt | None = None
    """Width of the decoder's hidden layers."""
    n_layers: PositiveInt | None = None
    """Hidden layers of the decoder."""
    dropout: float | None = Field(None, ge=0, lt=1)
    """Share of the decoder's hidden units left out in training."""


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
    decoder: ScviDecoderConfig | None = None
    """Sizes of the decoder, if they differ from the encoder's."""
    shared_theta: bool = True
    """One inverse dispersion per gene, or one per cell and gene."""
    kl_weight: float = Field(1.0, ge=0)
    """Weight of the KL term relative to the likelihood."""

    def for_decoder(self) -> ScviConfig:
        """Return the settings with the decoder's sizes in the place of the encoder's."""
        own = {} if self.decoder is None else self.decoder.model_dump(exclude_none=True)
        return self.model_copy(update={**own, "decoder": None})


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
