"""Print the table of GPU hours in docs/operations.md: `python docs/gpu_hours.py`.

The formulas are those of `scldm plan`.
"""

from __future__ import annotations

from pipeline.planning.cost import (
    encode_flops,
    estimate,
    format_hours,
    generate_flops,
    train_flow_flops,
    train_vae_flops,
)
from scldm.flow.config import SamplerConfig
from scldm.nn.config import DiTConfig

CENSUS_CELLS, CENSUS_GENES, CENSUS_EXPRESSED = 33e6, 36_130, 2_000


def paper_table() -> str:
    """Return the table in Markdown: one epoch of the Census models, and the stages after it."""
    from scldm.api.presets import preset

    rows = []
    for name in ("census_20m", "census_70m", "census_270m"):
        model = preset(name).vae.model  # type: ignore[union-attr]
        for scored, words in ((None, "all genes scored"), (8192, "8,192 genes a step")):
            flops = train_vae_flops(
                model, cells=CENSUS_CELLS, n_genes=CENSUS_GENES, scored=scored, expressed=CENSUS_EXPRESSED
            )
            rows.append((f"train_vae, {name}, an epoch of 33 M cells, {words}", estimate(flops, 16)))
    vae = preset("census_70m").vae.model  # type: ignore[union-attr]
    flow = DiTConfig(d_model=512, n_layers=12, n_heads=8)
    m, e = vae.n_latent_tokens, vae.latent_width
    rows.append(
        ("encode, census_70m, 33 M cells", estimate(encode_flops(vae, cells=33e6, expressed=CENSUS_EXPRESSED), 16))
    )
    flops = train_flow_flops(flow, cells=CENSUS_CELLS, n_latent_tokens=m, latent_width=e)
    rows.append(("train_flow, jobs/census, an epoch of 33 M cells", estimate(flops, 16)))
    for guidance in (1.0, 2.0):
        sampler = SamplerConfig(guidance=guidance)
        flops = generate_flops(flow, vae, sampler, cells=1e6, n_genes=CENSUS_GENES)
        solver = f"{sampler.solver} x {sampler.steps}"
        rows.append((f"generate, a million cells, {solver}, guidance {guidance:g}", estimate(flops, 16)))
    dentate = preset("dentate_gyrus").vae
    assert dentate is not None
    flops = train_vae_flops(dentate.model, cells=500 * 13_113, n_genes=17_002, scored=None, expressed=1_500)
    rows.append(("train_vae, dentate_gyrus, 500 epochs of 13,113 cells", estimate(flops, 8)))
    lines = ["| what | PFLOP | A100s | hours | GPU hours |", "|---|---|---|---|---|"]
    for what, found in rows:
        hours = " – ".join(map(format_hours, found.hours))
        lines.append(f"| {what} | {found.flops / 1e15:,.0f} | {found.gpus} | {hours} | {found.gpu_hours} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(paper_table())
