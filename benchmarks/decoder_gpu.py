"""The decoder on a GPU, its last block computed five ways: forward and backward, time, peak memory, share of the roof.

* plain: the formula of `plain_model.decode`, every gene of every cell at once, attention by SDPA;
* tiled: `Decoder._plain`, recomputed tile by tile; compiled: the same through `torch.compile`;
* hand: `fused_decoder.decode_genes`; triton: `triton_decoder.decode_genes`, or a line that says why not.

All of one model, in bf16 (or `--fp32`, with tf32 products) from latents to the logits' gradient; each in turns with the
tiled form, which is what the ratios are to. Needs a CUDA device.

    python benchmarks/decoder_gpu.py --json benchmarks/results/decoder_gpu.json
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from harness import Row, alternate, report
from torch import Tensor

from scldm.api.presets import preset
from scldm.nn.decoder import TILE, Decoder
from scldm.nn.kernels import fused_decoder, triton_decoder
from scldm.nn.layers import merge_heads, split_heads

PRESETS = ("dentate_gyrus", "census_20m", "census_270m")
# Dense TFLOP/s by the makers' data sheets: SXM cards.
ROOF = {"H200": (989, 495), "H100": (989, 495), "A100": (312, 156)}  # bf16, tf32


class Side:
    """One form of a preset's decoder, on its gene embedding and latents; a call is a forward and a backward pass."""

    def __init__(self, decoder: Decoder, embedding: Tensor, z: Tensor):
        self.decoder, self.embedding, self.z = decoder, embedding, z
        self.grad = torch.randn(len(z), len(embedding), 1, device=z.device)
        self.compiled = torch.compile(decoder._plain)

    def run(self, form: str) -> Tensor:
        """Gradient of the latents, so that forms can be compared."""
        self.decoder.zero_grad()
        self.embedding.grad = self.z.grad = None
        d = self.decoder
        x = d.from_latent(F.layer_norm(self.z, self.z.shape[-1:], eps=d.eps))
        for block in d.blocks:
            x = block(x)
        out = self._last_block(form, x)
        out.backward(self.grad.to(out.dtype))
        torch.cuda.synchronize()
        assert self.z.grad is not None
        return self.z.grad

    def _last_block(self, form: str, x: Tensor) -> Tensor:
        d, e = self.decoder, self.embedding
        context = d._context(x, None)
        if form == "plain":
            genes = e.expand(len(x), -1, -1)
            q = split_heads(d.query(d.norm_query(genes)), d.n_heads)
            y = genes + d.out(merge_heads(F.scaled_dot_product_attention(q, context.k, context.v)))
            return d.head(y + d.mlp(d.norm_mlp(y)))
        if form in ("tiled", "compiled"):
            return (d._plain if form == "tiled" else self.compiled)(e, context, TILE)
        decode = triton_decoder.decode_genes if form == "triton" else fused_decoder.decode_genes
        tile = None if form == "triton" else TILE
        return decode(d.query(d.norm_query(e)), e, context.k, context.v, block=d, eps=d.eps, tile=tile)

    def flops(self) -> float:
        """Of the last block's products in their cheapest form, three times the forward pass: recompute, folding and the
        self-attention over the tokens do not count, though the clock runs for them."""
        d, m, f = self.embedding.shape[1], self.z.shape[1], self.decoder.mlp.gate.out_features
        return 3 * 2 * len(self.z) * len(self.embedding) * (2 * m * d + d * d + 2 * d * f + f)


def build(name: str, n_cells: int, n_genes: int | None, dtype: torch.dtype) -> Side:
    torch.manual_seed(0)
    recipe = preset(name).vae
    assert recipe is not None
    config = recipe.model
    decoder = Decoder(config, n_outputs=1).to("cuda", dtype)
    embedding = torch.randn(n_genes or recipe.n_genes, config.d_model, device="cuda", dtype=dtype, requires_grad=True)
    shape = (n_cells, config.n_latent_tokens, config.latent_width)
    return Side(decoder, embedding, torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True))


def peak(call: Callable[[], object]) -> float:
    """MiB that a call adds to what is allocated before it."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def roof(dtype: torch.dtype) -> float | None:
    """FLOP/s of this card, None if it is not in the table."""
    name = torch.cuda.get_device_name()
    found = next((both for card, both in ROOF.items() if card in name), None)
    return None if found is None else 1e12 * found[0 if dtype == torch.bfloat16 else 1]


def measure(name: str, side: Side, dtype: torch.dtype, n: int) -> tuple[list[Row], dict[str, object]]:
    """Rows of one preset, and beside them what was not run and why, how far forms are apart, fractions of the roof."""
    unfit = triton_decoder.unsupported_reason(width=side.embedding.shape[1], n_outputs=1, dtype=dtype)
    notes: dict[str, object] = {"triton": unfit or "fits"}
    rows, memory = [], peak(lambda: side.run("tiled"))
    expected, limit = side.run("tiled").float(), roof(dtype)
    for form in ("plain", "compiled", "hand", "triton"):
        if form == "triton" and unfit:
            notes[form] = unfit
            continue
        try:
            found = side.run(form).float()
            used = peak(lambda form=form: side.run(form))
            row = alternate(
                f"{name}_{form}", lambda form=form: side.run(form), lambda: side.run("tiled"),
                work=len(side.z), unit="cells/s", n=n,
            )  # fmt: skip
        except torch.cuda.OutOfMemoryError:
            notes[form] = "out of memory"
            continue
        share = {key: side.flops() * rate / len(side.z) / limit if limit else None
                 for key, rate in ((form, row.value), ("tiled", row.baseline))}  # fmt: skip
        apart = float((found - expected).abs().max() / expected.abs().max())
        notes[form] = {"apart_from_tiled": apart, "fraction_of_roof": share}
        ratio = used / memory
        rows += [row, Row(f"{name}_{form}_peak_memory", used, "MiB", memory, ratio, 1, (ratio, ratio))]
    return rows, notes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows here too")
    parser.add_argument("--quick", action="store_true", help="4 cells, 2,000 genes, 5 pairs; for a look, not a claim")
    parser.add_argument("--cells", type=int, help="cells of a step (32)")
    parser.add_argument("--fp32", action="store_true", help="fp32 tensors, tf32 products")
    a = parser.parse_args()
    if not torch.cuda.is_available():
        print("decoder_gpu.py: no CUDA device here; nothing measured", file=sys.stderr)
        raise SystemExit(2)
    torch.set_float32_matmul_precision("high" if a.fp32 else "highest")
    dtype = torch.float32 if a.fp32 else torch.bfloat16
    rows: list[Row] = []
    notes: dict[str, object] = {}
    for name in PRESETS:
        side = build(name, a.cells or (4 if a.quick else 32), 2_000 if a.quick else None, dtype)
        found, notes[name] = measure(name, side, dtype, 5 if a.quick else 7)
        rows += found
    report(rows, a.json, card=torch.cuda.get_device_name(), dtype=str(dtype), presets=notes)


if __name__ == "__main__":
    main()
