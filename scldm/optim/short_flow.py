"""Train a flow for a few hundred steps on latents in memory: a plain loop, a function of its arguments.

For many small trainings whose results are compared, such as one without each of some combinations of labels. Training
of a model that is kept streams its cells, saves checkpoints and uses several workers (`pipeline.training`).

Shape letters: n cells, b cells of a batch, m latent tokens, e latent width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from scldm.flow.config import PathConfig
from scldm.flow.objective import flow_loss
from scldm.flow.path import sample_path
from scldm.nn.config import DiTConfig
from scldm.nn.dit import ClassFeatures, DiT, drop_labels
from scldm.optim.adamw import adamw
from scldm.optim.config import EMAConfig, OptimizerConfig
from scldm.optim.ema import EMA
from scldm.optim.schedule import learning_rate_factor
from scldm.random import generator

ORDER, DRAWS = 31, 32  # streams of randomness


@dataclass(frozen=True)
class ShortTraining:
    """How long and how fast."""

    steps: int
    batch_size: int
    optimizer: OptimizerConfig
    ema: EMAConfig


def new_dit(
    config: DiTConfig,
    *,
    latent_shape: tuple[int, int],
    n_classes: Mapping[str, int],
    seed: int,
    features: Mapping[str, ClassFeatures] | None = None,
) -> DiT:
    """Return an untrained network; its weights are a function of the seed."""
    m, e = latent_shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return DiT(config, n_latent_tokens=m, latent_width=e, n_classes=n_classes, features=features)


def train_flow(
    dit: DiT,
    z: Tensor,
    ids: Mapping[str, Tensor],
    training: ShortTraining,
    *,
    path: PathConfig,
    label_dropout: float,
    seed: int,
    progress: Callable[[int], None] = lambda step: None,
) -> dict[str, Tensor]:
    """Train a network on cells, and return its averaged weights.

    In training each label is dropped on its own, so that the field of a treatment exists without a context.

    Args:
        dit: The network, with the weights to start from; it is trained in place, on its device.
        z: Latents on the CPU, (n, m, e).
        ids: Label -> class ids on the CPU, (n,).
        training: Steps, batch size, schedule.
        path: Path and prediction.
        label_dropout: Probability that a label is dropped.
        seed: Seed of order, times, noise and dropped labels.
        progress: Called after every step with their number.

    Raises:
        FloatingPointError: The loss is not finite.
    """
    parameters = [p for p in dit.parameters() if p.requires_grad]
    optimizer, average = adamw(dit, training.optimizer), EMA(dit, training.ema)
    rows_of_steps = batches(len(z), min(training.batch_size, len(z)), seed)
    device = parameters[0].device
    dit.train()
    for step in range(training.steps):
        rows, g = next(rows_of_steps), generator(seed, DRAWS, step)
        for group in optimizer.param_groups:
            group["lr"] = training.optimizer.lr * learning_rate_factor(step, training.steps, training.optimizer)
        optimizer.zero_grad()
        x1 = z[rows].to(device)
        t, x0 = (draw.to(device) for draw in (torch.rand(len(x1), generator=g), torch.randn(x1.shape, generator=g)))
        dropped = drop_labels(
            {name: values[rows] for name, values in ids.items()}, dit.n_classes, p=label_dropout,
            strategy=dit.strategy, joint_dropout="each", generator=g,
        )  # fmt: skip
        known = {name: values.to(device) for name, values in dropped.items()}
        point = sample_path(x0, x1, t, path.path)
        loss = flow_loss(dit(point.x_t, t, known), point, t, path).mean()
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss.item()} at step {step}; lower the learning rate")
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, training.optimizer.clip)
        optimizer.step()
        average.update(step + 1)
        progress(step + 1)
    return average.state_dict()


def batches(n: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Yield rows without end: each epoch is a permutation of its own, and drops what does not fill a batch."""
    epoch = 0
    while True:
        order = torch.randperm(n, generator=generator(seed, ORDER, epoch))
        yield from order[: n - n % batch_size].split(batch_size)
        epoch += 1
