"""Named models of the paper and of upstream's repositories: sizes, and training as far as it is known.

Sizes come from upstream's configuration files. The files of the Census models were not published; their sizes come from
the checkpoints' widths and layers and from their names. Inferred settings are listed with each preset. None sets
`genes_seq_len`: a new model masks its pads, and a converted checkpoint has its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from scldm.errors import InputError
from scldm.flow.config import PathConfig
from scldm.nn.config import DiTConfig, VAEConfig
from scldm.optim.config import EMAConfig, OptimizerConfig
from scldm.text import did_you_mean


@dataclass(frozen=True)
class VaeRecipe:
    """An autoencoder and its training."""

    model: VAEConfig
    n_genes: int
    parameters: float  # upstream's, in millions, to the digits that it is known to
    optimizer: OptimizerConfig | None = None
    batch_size: int | None = None  # over all workers
    epochs: int | None = None


@dataclass(frozen=True)
class FlowRecipe:
    """A DiT and its training, on latents (m, e)."""

    model: DiTConfig
    latent_shape: tuple[int, int]
    n_classes: Mapping[str, int]
    parameters: float | None  # upstream's, in millions, its frozen positions among them
    optimizer: OptimizerConfig | None = None
    ema: EMAConfig | None = None
    path: PathConfig = field(default_factory=PathConfig)
    batch_size: int | None = None
    epochs: int | None = None


@dataclass(frozen=True)
class Preset:
    """A named model."""

    name: str
    about: str
    vae: VaeRecipe | None = None
    flow: FlowRecipe | None = None
    inferred: tuple[str, ...] = ()  # settings that no source states


class UnknownPresetError(InputError, ValueError):
    """No preset has that name; the message suggests similar ones."""


def preset(name: str) -> Preset:
    """Return the preset of a name; `preset_names()` lists them."""
    if name not in _PRESETS:
        hint = did_you_mean(name, _PRESETS, quote="", n=3) or f"known: {', '.join(_PRESETS)}"
        raise UnknownPresetError(f"no preset {name!r}; {hint}")
    return _PRESETS[name](name)


def preset_names() -> tuple[str, ...]:
    """Return the names of all presets."""
    return tuple(_PRESETS)


# Upstream's schedule holds until the last tenth, then falls with the root of the progress to a tenth of the peak.
_VAE_OPTIMIZER = OptimizerConfig(
    lr=1e-3, betas=(0.9, 0.95), warmup=0.1, decay=0.1, decay_type="sqrt", final_factor=0.1, clip=10.0
)
_FLOW_OPTIMIZER = OptimizerConfig(
    lr=5e-4, betas=(0.9, 0.999), warmup=0.1, decay=0.9, decay_type="cosine", final_factor=0.1, clip=10.0
)
_EMA = EMAConfig(decay=0.9999, every=10, start=10_000)


def _upstream_vae(**sizes: object) -> VAEConfig:
    """Return upstream's transformer VAE: counts scale embeddings, one theta per gene, no gene bias, frozen
    positions."""
    common = {"input": "log1p", "head": "nb_shared", "gene_bias": False, "zero_positions": True}
    return VAEConfig.model_validate({**common, **sizes})


def _upstream_dit(**sizes: object) -> DiTConfig:
    common = {"d_model": 256, "n_layers": 8, "n_heads": 8, "label_dropout": 0.8, "strategy": "mutually_exclusive"}
    return DiTConfig.model_validate({**common, **sizes})


def _default(name: str) -> Preset:
    return Preset(
        name,
        "upstream's repository default, on Dentate Gyrus; not the model of the paper",
        VaeRecipe(
            _upstream_vae(
                d_model=32, n_layers=8, n_heads=8, n_heads_cross=4, n_latent_tokens=16, latent_width=16
            ),
            n_genes=17_002, parameters=0.79, optimizer=_VAE_OPTIMIZER, batch_size=128, epochs=100,
        ),
        _flow((16, 16), {"clusters": 14}, None),
    )  # fmt: skip


def _flow(latent_shape: tuple[int, int], n_classes: Mapping[str, int], parameters: float | None) -> FlowRecipe:
    """Return upstream's DiT: 256 wide, 8 blocks, 8 heads, as in the paper's Table 9."""
    return FlowRecipe(
        _upstream_dit(), latent_shape, n_classes, parameters, _FLOW_OPTIMIZER, _EMA, batch_size=128, epochs=100
    )


def _dentate_gyrus(name: str) -> Preset:
    return Preset(
        name,
        "the paper's Dentate Gyrus model: 128 latent tokens, as its author's cross-validation script sets it up",
        VaeRecipe(
            _upstream_vae(
                d_model=128, n_layers=2, n_heads=4, n_heads_cross=1, n_latent_tokens=128, latent_width=16
            ),
            n_genes=17_002, parameters=3.42, optimizer=_VAE_OPTIMIZER, batch_size=128, epochs=500,
        ),
        _flow((128, 16), {"clusters": 14}, 9.77),
        inferred=("flow: the repository's DiT on 128 tokens",),
    )  # fmt: skip


def _census(d_model: int, parameters: float) -> Callable[[str], Preset]:
    def build(name: str) -> Preset:
        model = _upstream_vae(
            d_model=d_model, n_layers=8, n_heads=8, n_heads_cross=4, n_latent_tokens=256, latent_width=16,
            input="projconcat",
        )  # fmt: skip
        return Preset(
            name,
            f"the paper's Census autoencoder, {d_model} wide, on 36,130 human genes",
            VaeRecipe(model, n_genes=36_130, parameters=parameters),
            inferred=("n_heads", "n_heads_cross", "n_latent_tokens", "latent_width", "optimizer", "batch_size"),
        )

    return build


def _cd4(name: str) -> Preset:
    cosine = {"warmup": 0.1, "decay": 0.9, "decay_type": "cosine", "final_factor": 0.1, "weight_decay": 0.01}
    return Preset(
        name,
        "scLDM.CD4, its successor, on 3,699 genes of perturbed T cells: labels of a cell are joint",
        VaeRecipe(
            _upstream_vae(
                d_model=256, n_layers=8, n_heads=4, n_heads_cross=4, n_latent_tokens=256, latent_width=16,
                input="softbin",
            ),
            n_genes=3_699, parameters=15.3, batch_size=64, epochs=60,
            optimizer=OptimizerConfig.model_validate({"lr": 1e-4, "betas": (0.9, 0.95), "clip": 10.0, **cosine}),
        ),
        FlowRecipe(
            _upstream_dit(d_model=512, strategy="joint", bias=False),
            (256, 16),
            {"donor_id": 4, "guide_target_ensembl": 10_571, "experimental_perturbation_time_point": 3},
            parameters=44.3, ema=_EMA, batch_size=512, epochs=150,
            # 3e-5 times eight workers.
            optimizer=OptimizerConfig.model_validate({"lr": 2.4e-4, "betas": (0.9, 0.999), "clip": 1.0, **cosine}),
        ),
        inferred=("zero_positions (15.3 M with them, 15.2 M without, as its card says)", "flow: label_dropout, ema"),
    )  # fmt: skip


_PRESETS: dict[str, Callable[[str], Preset]] = {
    "upstream_default": _default,
    "dentate_gyrus": _dentate_gyrus,
    "census_20m": _census(256, 23.8),
    "census_70m": _census(512, 76.1),
    "census_270m": _census(1024, 266.0),
    "cd4": _cd4,
}
