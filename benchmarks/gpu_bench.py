"""Everything that a machine with GPUs must confirm or measure, in 12 minutes: `make gpu`.

tests/gpu; a training step of the 20M, 70M and 270M VAE and of a DiT, eager and compiled, in bf16, tf32 and fp32, of 128
and 32 cells, with MFU and peak memory; encoding and generation; the demo's job; ZeRO 0 to 3, and NCCL between two GPUs.
Every part has a share of the time, and what it does not reach is listed. A part that fails is named with its error,
the rest goes on, and the exit code is 1.

    python benchmarks/gpu_bench.py --minutes 12         # writes benchmarks/results/gpu.json and gpu.md
    python benchmarks/gpu_bench.py --rehearse           # everything at tiny sizes on the CPU
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from gpu_parts.inference import inference
from gpu_parts.plan import Outcome, Part, run_parts
from gpu_parts.programs import demo, gpu_tests, ranks
from gpu_parts.sizes import Sizes, real_sizes, rehearsal_sizes
from gpu_parts.steps import flow_steps, vae_steps
from harness import machine

ROOT = Path(__file__).resolve().parents[1]
SMI = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]


def parts_of(sizes: Sizes) -> list[Part]:
    """Return the parts, those first that tell whether anything is wrong."""
    return [
        Part("tests", 3.0, gpu_tests(sizes)),
        Part("vae_steps", 4.0, vae_steps(sizes)),
        Part("flow_steps", 1.5, flow_steps(sizes)),
        Part("inference", 1.0, inference(sizes)),
        Part("ranks", 1.5, ranks(sizes)),
        Part("demo", 2.0, demo(sizes)),
    ]


def about_device() -> dict[str, object]:
    """Return what decides the figures: cards, driver, versions, links between cards."""
    about: dict[str, object] = {"torch": torch.__version__, "cuda": torch.version.cuda}
    if torch.cuda.is_available():
        about["cards"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        for name, words in (("nvidia_smi", SMI), ("links", ["nvidia-smi", "topo", "-m"])):
            try:
                done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=False)
                about[name] = done.stdout.strip().splitlines()
            except (OSError, subprocess.TimeoutExpired) as error:
                about[name] = str(error)
    return about


def markdown(outcomes: Sequence[Outcome], device: dict[str, object]) -> str:
    """Return the parts and their figures as tables."""
    cards = ", ".join(map(str, device.get("cards", []))) or "no GPU: a rehearsal"  # type: ignore[arg-type, call-overload]
    lines = [f"# GPU figures: {cards}", "", f"torch {device['torch']}, CUDA {device['cuda']}", ""]
    lines += ["| part | state | seconds | why |", "|---|---|---|---|"]
    lines += [f"| {o.name} | {o.state} | {o.seconds:.0f} | {_cell(o.why)} |" for o in outcomes]
    lines += ["", "| figure | value | unit | over eager | n |", "|---|---|---|---|---|"]
    for row in (r for o in outcomes for r in o.rows):
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        lines.append(f"| {row.name} | {row.value:.4g} | {row.unit} | {ratio} | {row.n} |")
    for title, kind in (("Errors", "errors"), ("Notes", "notes")):
        found = [f"* {o.name}: {_cell(text)}" for o in outcomes for text in getattr(o, kind)]
        lines += ["", f"## {title}", "", *found] if found else []
    return "\n".join(lines) + "\n"


def _cell(text: str, most: int = 400) -> str:
    flat = " ".join(text.split()).replace("|", "\\|")
    return flat if len(flat) <= most else f"… {flat[-most:]}"


def main(words: Sequence[str] | None = None) -> int:
    """Run the parts and write what was found; return 1 if one of them failed, 2 if there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=12, help="of everything together (12)")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU; nothing is measured")
    parser.add_argument("--part", action="append", help="only this part; repeatable")
    parser.add_argument("--json", type=Path, help="file of the figures; the table stands beside it, as .md")
    given = parser.parse_args(words)
    if not given.rehearse and not torch.cuda.is_available():
        print("gpu_bench.py: this machine has no CUDA device, nothing was measured; --rehearse runs on the CPU",
              file=sys.stderr)  # fmt: skip
        return 2
    sizes = rehearsal_sizes() if given.rehearse else real_sizes()
    out = given.json or ROOT / ("build/gpu_rehearsal.json" if given.rehearse else "benchmarks/results/gpu.json")
    parts = parts_of(sizes)
    if given.part:
        if unknown := sorted(set(given.part) - {p.name for p in parts}):
            parser.error(f"no part {', '.join(unknown)}; there are {', '.join(p.name for p in parts)}")
        parts = [p for p in parts if p.name in given.part]
    outcomes = run_parts(parts, 60 * given.minutes, lambda line: print(line, flush=True))
    device = about_device()
    document = {
        "machine": machine(), "command": shlex.join(["python", *sys.argv]), "device": device,
        "parts": [o.about() for o in outcomes], "rows": [asdict(r) for o in outcomes for r in o.rows],
    }  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document, indent=1) + "\n")
    table = out.with_suffix(".md")
    table.write_text(markdown(outcomes, device))
    print(table.read_text())
    for failed in (o for o in outcomes if o.state == "failed"):
        print(f"{failed.name} failed: {failed.why}\n" + "\n".join(failed.errors), file=sys.stderr)
    return int(any(o.state == "failed" for o in outcomes))


if __name__ == "__main__":
    sys.exit(main())
