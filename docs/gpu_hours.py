"""Print the table of GPU hours in docs/operations.md: `python docs/gpu_hours.py`.

The formulas are those of `scldm plan`.
"""

from __future__ import annotations

from pipeline.planning.cost import (
    Estimate,
    encode_flops,
    estimate,
    format_hours,
    generate_flops,
    generation_evaluations,
    train_flow_flops,
    train_vae_flops,
)
from pipeline.planning.launches import (
    dit_step_launches,
    encode_launches,
    generate_launches,
    vae_step_launches,
)
from scldm.flow.config import SamplerConfig
from scldm.nn.config import DiTConfig

CENSUS_CELLS, CENSUS_GENES, CENSUS_EXPRESSED = 33e6, 36_130, 2_000
MICRO, ENCODED, GENERATED = 128, 512, 1024  # cells that a GPU computes with at a time
GPUS = 16


def paper_table() -> str:
    """Return the table in Markdown: one epoch of the Census models, and the stages after it."""
    rows = [*_trainings(), *_stages(), _dentate_gyrus()]
    lines = ["| what | PFLOP | A100s | MFU | hours | GPU hours |", "|---|---|---|---|---|---|"]
    for what, found in rows:
        hours = " – ".join(map(format_hours, found.hours))
        share = " – ".join(f"{m:.0%}" for m in found.mfu)
        lines.append(f"| {what} | {found.flops / 1e15:,.0f} | {found.gpus} | {share} | {hours} | {found.gpu_hours} |")
    return "\n".join(lines)


def _trainings() -> list[tuple[str, Estimate]]:
    from scldm.api.presets import preset

    rows = []
    for name in ("census_20m", "census_70m", "census_270m"):
        model = preset(name).vae.model  # type: ignore[union-attr]
        for scored, words in ((None, "all genes scored"), (8192, "8,192 genes a step")):
            flops = train_vae_flops(
                model, cells=CENSUS_CELLS, n_genes=CENSUS_GENES, scored=scored, expressed=CENSUS_EXPRESSED
            )
            step = vae_step_launches(model, cells=MICRO, n_genes=scored or CENSUS_GENES, precision="bf16")
            found = estimate(flops, GPUS, launches=CENSUS_CELLS / (GPUS * MICRO) * step)
            rows.append((f"train_vae, {name}, an epoch of 33 M cells, {words}", found))
    return rows


def _stages() -> list[tuple[str, Estimate]]:
    """Encoding, the flow and generation with census_70m."""
    from scldm.api.presets import preset

    vae = preset("census_70m").vae.model  # type: ignore[union-attr]
    flow = DiTConfig(d_model=512, n_layers=12, n_heads=8)
    m, e = vae.n_latent_tokens, vae.latent_width
    flops = encode_flops(vae, cells=CENSUS_CELLS, expressed=CENSUS_EXPRESSED)
    launches = CENSUS_CELLS / (GPUS * ENCODED) * encode_launches(vae, precision="bf16")
    rows = [("encode, census_70m, 33 M cells", estimate(flops, GPUS, launches=launches))]
    flops = train_flow_flops(flow, cells=CENSUS_CELLS, n_latent_tokens=m, latent_width=e)
    launches = CENSUS_CELLS / (GPUS * MICRO) * dit_step_launches(flow, precision="bf16")
    rows.append(("train_flow, jobs/census, an epoch of 33 M cells", estimate(flops, GPUS, launches=launches)))
    for guidance in (1.0, 2.0):
        sampler = SamplerConfig(guidance=guidance)
        flops = generate_flops(flow, vae, sampler, cells=1e6, n_genes=CENSUS_GENES)
        evaluations = generation_evaluations(sampler, flow.strategy, "noise")
        each = generate_launches(
            flow, vae, evaluations=evaluations, cells=GENERATED, n_genes=CENSUS_GENES, precision="bf16"
        )
        solver = f"{sampler.solver} x {sampler.steps}"
        found = estimate(flops, GPUS, launches=1e6 / (GPUS * GENERATED) * each)
        rows.append((f"generate, a million cells, {solver}, guidance {guidance:g}", found))
    return rows


def _dentate_gyrus() -> tuple[str, Estimate]:
    """The preset of the paper's smallest set on one GPU, 128 cells a step."""
    from scldm.api.presets import preset

    dentate = preset("dentate_gyrus").vae
    assert dentate is not None
    cells = 500 * 13_113
    flops = train_vae_flops(dentate.model, cells=cells, n_genes=17_002, scored=None, expressed=1_500)
    step = vae_step_launches(dentate.model, cells=MICRO, n_genes=17_002, precision="bf16")
    return "train_vae, dentate_gyrus, 500 epochs of 13,113 cells", estimate(flops, 1, launches=cells / MICRO * step)


if __name__ == "__main__":
    print(paper_table())
