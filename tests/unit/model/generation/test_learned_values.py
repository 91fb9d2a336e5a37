"""What a small flow says of values that it never saw, against a truth that is known: numbers and vectors."""

from __future__ import annotations

import numpy as np
import torch
from helpers.models.label_values import number
from helpers.models.small_models import vocabulary

from scldm.checkpoints.asked_values import with_values
from scldm.checkpoints.native import LoadedFlow, new_dit
from scldm.data.labels.values import Vectors
from scldm.data.labels.vectors import NamedVectors, fit_vectors
from scldm.data.library_size import LibrarySizes
from scldm.data.vocabulary import LabelVocabulary
from scldm.flow.config import PathConfig, SamplerConfig
from scldm.flow.objective import flow_loss
from scldm.flow.path import sample_path, training_interval
from scldm.flow.sampler import sample_latents
from scldm.nn.config import DiTConfig
from scldm.random import generator

STEPS, CELLS, BATCH = 300, 2000, 128
SOLVER = SamplerConfig(solver="midpoint", steps=8)


def trained(label: LabelVocabulary, truth: np.ndarray, *, sd: float) -> LoadedFlow:
    """A flow trained on cells whose only latent token is Normal(truth of the class, sd): truth is (n_classes, e)."""
    names, e, path, g = vocabulary(label), truth.shape[1], PathConfig(), generator(0, 1)
    ids = torch.randint(len(label.classes), (CELLS,), generator=g)
    x1 = (torch.from_numpy(truth).float()[ids] + sd * torch.randn(CELLS, e, generator=g)).unsqueeze(1)
    torch.manual_seed(0)
    dit = new_dit(DiTConfig(d_model=32, n_layers=1, n_heads=2), names, latent_shape=(1, e))
    optimizer = torch.optim.AdamW(dit.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=STEPS)
    t0, t1 = training_interval(path)
    for _ in range(STEPS):
        rows = torch.randint(CELLS, (BATCH,), generator=g)
        t = t0 + (t1 - t0) * torch.rand(BATCH, generator=g)
        point = sample_path(torch.randn(BATCH, 1, e, generator=g), x1[rows], t, path.path)
        given = torch.where(torch.rand(BATCH, generator=g) < 0.1, label.null_id, ids[rows])
        loss = flow_loss(dit(point.x_t, t, {label.name: given}), point, t, path).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return LoadedFlow(dit.eval(), path, names, LibrarySizes({}, "none"), 1, e)


@torch.inference_mode()
def means(flow: LoadedFlow, label: str, values: list[str], n: int = 200) -> np.ndarray:
    """The mean of generated cells of each value, (len(values), e)."""
    wide = with_values(flow, [{label: v} for v in values])
    ids = torch.from_numpy(wide.vocabulary.label(label).encode(values)).repeat_interleave(n)
    noise = torch.randn(len(ids), 1, flow.latent_width, generator=generator(0, 2))
    z = sample_latents(wide.dit, noise, {label: ids}, SOLVER, flow.path)
    return z.reshape(len(values), n, -1).mean(1).numpy()


def response(dose: np.ndarray) -> np.ndarray:
    return np.stack([np.log10(dose), np.sin(1.5 * np.log10(dose))], axis=1)


def test_doses_between_those_of_the_training_cells_are_near_the_truth_and_on_a_smooth_curve():
    label = number(classes=("0.1", "0.3", "1", "3", "10"), kind="float64", scale="log")
    flow = trained(label, response(np.array([float(c) for c in label.classes])), sd=0.1)
    doses = np.geomspace(0.1, 10, 17)
    curve = means(flow, "dose", [f"{d:.6g}" for d in doses])
    assert np.abs(curve - response(doses)).max() < 0.15  # of a response from -1 to 1
    assert np.abs(np.diff(curve, axis=0)).max() < 0.35  # a step of the truth is at most 0.19


def test_a_name_that_was_never_measured_gets_what_its_vector_says():
    rng = np.random.default_rng(0)
    names, measured = [f"p{i}" for i in range(60)], [f"p{i}" for i in range(40)]
    x = rng.normal(size=(60, 6))
    truth = x @ rng.normal(size=(6, 3)) / np.sqrt(6)  # the effect is linear in the vector
    table = fit_vectors("gene", NamedVectors(tuple(names), x), measured)
    classes = tuple(sorted(measured))
    label = LabelVocabulary("gene", classes, values=Vectors(classes, table))
    at = {name: i for i, name in enumerate(names)}
    flow = trained(label, truth[[at[c] for c in classes]], sd=0.3)
    unseen = [name for name in names if name not in measured]
    own = truth[[at[name] for name in unseen]]
    error = ((means(flow, "gene", unseen) - own) ** 2).mean()
    of_mean = ((truth[[at[name] for name in measured]].mean(0) - own) ** 2).mean()
    assert error < 0.25 * of_mean
