"""A worker's part of `train_flow`: build the DiT, train it on cached latents and export it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from pipeline.core.manifest import Manifest
from pipeline.core.text import human
from pipeline.data.ingest.dataset import IngestedDataset
from pipeline.data.loading.blocks import IpcBlocks
from pipeline.data.loading.order import FeedOrder
from pipeline.training.loop import run_training
from pipeline.training.objectives.controls import ControlStarts, of_vocabulary, read_controls
from pipeline.training.objectives.flow import FlowDraws, FlowObjective
from pipeline.training.objectives.vae import validation_tables
from pipeline.training.state import Run
from pipeline.training.tasks.base import Rates, make_order, report_start, training_facts
from pipeline.training.tasks.joint import VAE_FOLDERS, train_joint
from pipeline.training.tasks.spec import FlowWorkerSpec
from scldm.checkpoints.native import load_flow, load_vae, new_dit, save_flow
from scldm.checkpoints.start_from import adapt, freeze, slow_down, start_flow
from scldm.errors import InputError
from scldm.nn.dit import DiT
from scldm.nn.flops import dit_flops
from scldm.optim.lora import merged

if TYPE_CHECKING:
    from pipeline.training.objectives.samples import FlowSamples

log = logging.getLogger(__name__)


def train_flow(spec: FlowWorkerSpec, run: Run) -> dict[str, Any]:
    """Train and export a flow, with the VAE if `vae.train` is set. Collective. Returns the stage's facts."""
    config, train = spec.config, spec.config.train
    if config.vae.train:
        result, both = train_joint(config, spec.inputs, run, seed=spec.seed, card=spec.card)
        shape = [both.vae.config.n_latent_tokens, both.vae.config.latent_width]
        return training_facts(result, train.export, both) | {"vae": VAE_FOLDERS, "latent_shape": shape}
    data = IngestedDataset.open(spec.inputs["ingest"])
    encoded = spec.inputs["encode"]
    m, e = encoded.facts["latent_shape"]
    n_classes = data.vocabulary.n_classes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)
        dit = new_dit(config.model, data.vocabulary, latent_shape=(m, e), from_controls=config.start is not None)
    started, rates = _start_from(spec, dit, data)
    source = latent_blocks(encoded, "train")
    order = make_order(source, train.feed, spec.seed)
    lanes = order.lanes_of(dist.get_rank(), dist.get_world_size())
    objective = FlowObjective(
        dit,
        path=config.flow,
        n_classes=n_classes,
        draws=FlowDraws(
            spec.seed, order, lanes, latent_shape=(m, e), n_labels=len(n_classes),
            controls=_controls(spec, data, source, order, lanes, (m, e)),
        ),
        label_dropout=config.model.label_dropout,
        validation=validation_tables(
            latent_blocks(encoded, "validation"), n_cells=train.validation_cells,
            batch_size=train.feed.micro_batch_size, seed=spec.seed,
        ),
        samples=flow_samples(spec, data) if dist.get_rank() == 0 else None,
    )  # fmt: skip
    flops = dit_flops(config.model, n_latent_tokens=m, latent_width=e)
    result = run_training(
        objective, source, order, train, replace(run, flops_per_cell=flops), ema_config=train.ema, rates=rates
    )
    raw = result.engine.export_state(result.checkpoint)
    assert result.ema is not None
    if dist.get_rank() == 0:
        averaged = {**raw, **{k: v.float().cpu() for k, v in result.ema.state_dict().items()}}
        lora = None if config.start_from is None else config.start_from.lora
        save_flow(
            run.folder / "model", {"model": merged(averaged, lora), "raw": merged(raw, lora)},
            config=config.model, path=config.flow,
            latent_shape=(m, e), vocabulary=data.vocabulary, library_sizes=data.library_sizes, card=spec.card,
            start=None if config.controls is None else of_vocabulary(config.controls, data.vocabulary),
        )  # fmt: skip
    dist.barrier()
    return training_facts(result, train.export, dit) | started


def _controls(
    spec: FlowWorkerSpec,
    data: IngestedDataset,
    source: IpcBlocks,
    order: FeedOrder,
    lanes: Sequence[int],
    shape: tuple[int, int],
) -> ControlStarts | None:
    """Read the control cells that cells start at; None if all start at noise."""
    if spec.config.start is None:
        return None
    cells = read_controls(source, spec.config.start, data.vocabulary, shape=shape, seed=spec.seed)
    if dist.get_rank() == 0:
        held = human(cells.latents.numel() * cells.latents.element_size())
        log.info("%d control cells in %d groups: %s of latents", len(cells.latents), len(cells.rows), held)
    return ControlStarts(cells, source, order, lanes, share=spec.config.start.share, seed=spec.seed)


def _start_from(spec: FlowWorkerSpec, dit: DiT, data: IngestedDataset) -> tuple[dict[str, Any], Rates]:
    """Give the DiT the weights that it starts from, if there are any.

    Returns:
        What was taken over, as a fact, and its learning rates.
    """
    if spec.start_from is None or spec.config.start_from is None:
        return {}, {}
    parents = spec.config.start_from.parents
    started = start_flow(dit, data.vocabulary, load_flow(spec.start_from), parents=parents)
    started.frozen = freeze(dit, spec.config.start_from.freeze)
    if (lora := spec.config.start_from.lora) is not None:
        adapt(dit, lora, started, seed=spec.seed)
    rates = slow_down(dit, spec.config.start_from.old_learning_rate, started)
    return {"start_from": report_start(spec.start_from, started)}, rates


def latent_blocks(encoded: Manifest, split: str) -> IpcBlocks:
    """Open the latent cache of a split as a source of blocks."""
    if split not in encoded.facts["shards"]:
        raise InputError(f"the latent cache {encoded.folder} holds no {split} cells; add {split} to encode.splits")
    files = encoded.facts["shards"][split]
    return IpcBlocks(str(encoded.path("latents")), tuple((f["file"], f["n_cells"]) for f in files))


def flow_samples(spec: FlowWorkerSpec, data: IngestedDataset) -> FlowSamples | None:
    """Prepare cells to generate in validations; None unless `train.sample_every` is set."""
    every, n = spec.config.train.sample_every, spec.config.train.sample_cells
    if every is None:
        return None
    from pipeline.training.objectives.samples import (
        FlowSamples,  # loads scikit-learn and the report: seconds of a worker's start
    )

    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    vae = load_vae(spec.inputs["train_vae"].path("model"), device=device)
    held_out = data.anndata("validation", max_cells=n, seed=spec.seed)
    training = data.anndata("train", max_cells=4 * n, seed=spec.seed)
    return FlowSamples(held_out, training, vae, path=spec.config.flow, every=every, seed=spec.seed)
