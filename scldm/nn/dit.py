"""Diffusion transformer: a point of the flow, its time and its labels to a prediction.

Shape letters: b cells, m latent tokens, e latent width, d model width. x_t is (b, m, e), t is (b,), and `conditions`
maps a label to ids (b,). Every label has a null class, id = n_classes; a label that is absent is null. The embeddings
of all labels, null or not, are added to the embedding of the time, for both strategies: what differs between `joint`
and `mutually_exclusive` is which labels are set together (`drop_labels`, `scldm.flow.guidance`).

A class has a row of its own in a table, or, if the label's classes are values, an embedding that is computed from a row
of features (`ValueEmbedding`, `PooledEmbedding`): then a class that no cell had can be embedded too.

A network may hold two fields: one from noise, and one from the latents of control cells. A learned vector, added to the
embedding of cells that start at controls, tells them apart.

A block computes norm(x) * (1 + chunk 0) + chunk 1, the final layer norm(x) * (1 + chunk 1) + chunk 0. The two orders
differ because upstream's checkpoints were trained so.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scldm.nn.config import DiTConfig
from scldm.nn.kernels.precision import Precision, in_own_precision
from scldm.nn.layers import SelfAttention, SwiGLU

Strategy = Literal["joint", "mutually_exclusive"]
JointDropout = Literal["all_then_each", "all", "each"]

TABLE_STD = 0.02  # of the rows of a label's table at first
N_FREQUENCIES = 256  # sines and cosines of the time embedding, fixed by upstream's checkpoints


def label_table_name(label: str) -> str:
    """Return the module name of a label's table.

    The prefix keeps a label such as `type` from hiding a method of nn.Module.
    """
    return "label_" + label.replace("%", "%25").replace(".", "%2E")


def modulate(x: Tensor, *, shift: Tensor, scale: Tensor) -> Tensor:
    """Scale and shift x (b, m, d) by (b, d) each. Keyword-only: the two have the same type and are easy to swap."""
    return torch.addcmul(shift.unsqueeze(1), x, 1 + scale.unsqueeze(1))


def time_frequencies(t: Tensor) -> Tensor:
    """Embed t (b,) as (b, 256): cosines, then sines, at geometrically spaced frequencies from 1 down to 1e-4."""
    half = N_FREQUENCIES // 2
    frequencies = torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float().unsqueeze(-1) * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def sincos_positions(n_positions: int, d_model: int) -> Tensor:
    """Return fixed position embeddings, (1, n_positions, d): sines, then cosines."""
    omega = 10_000 ** -(torch.arange(d_model // 2, dtype=torch.float64) / (d_model / 2))
    angles = torch.arange(n_positions, dtype=torch.float64).unsqueeze(-1) * omega
    return torch.cat([angles.sin(), angles.cos()], dim=-1).float().unsqueeze(0)


class TimeEmbedding(nn.Module):
    """Two-layer MLP on fixed frequencies of the time."""

    def __init__(self, d_model: int):
        super().__init__()
        self.up = nn.Linear(N_FREQUENCIES, d_model)
        self.down = nn.Linear(d_model, d_model)

    def forward(self, t: Tensor) -> Tensor:
        """Embed times t (b,) as (b, d)."""
        frequencies = time_frequencies(t).to(self.up.weight.dtype)
        return self.down(F.silu(self.up(frequencies)))  # (b, d)


@dataclass(frozen=True)
class ClassFeatures:
    """What the classes of a label mean, in numbers."""

    rows: Tensor  # (n_classes, f) float32
    pooled: bool = False  # whether the embedding is the sum of one vector for each feature, as of a set's members


class FeatureEmbedding(nn.Module, ABC):
    """Embeds the classes of a label by their features; the null class has a vector of its own.

    Features are facts of the data and no weights: they are in no state dict, and stay in fp32.
    """

    features: Tensor  # (n_classes + 1, f); the last row, of the null class, is not used

    def __init__(self, rows: Tensor, d_model: int):
        super().__init__()
        self.null = nn.Parameter(torch.zeros(d_model))
        self.set_classes(rows)

    def set_classes(self, rows: Tensor) -> None:
        """Set the features of all classes, (n_classes, f)."""
        self.features = torch.cat([rows.float(), rows.new_zeros(1, rows.shape[1]).float()]).to(self.null.device)

    def forward(self, ids: Tensor) -> Tensor:
        """Embed class ids (b,) as (b, d)."""
        embedded = self.embed(self.features[ids].to(self.null.dtype))
        return torch.where((ids == len(self.features) - 1).unsqueeze(-1), self.null, embedded)

    @abstractmethod
    def embed(self, features: Tensor) -> Tensor:
        """Embed features (b, f) as (b, d)."""

    @abstractmethod
    def initialise(self) -> None:
        """Draw the weights, so that embeddings are as large as the rows of a table are at first."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.features = self.features.to(fn(self.features).device)  # the device, and never the precision
        return self


class ValueEmbedding(FeatureEmbedding):
    """Two-layer MLP on the features: smooth in a number, and close for vectors that are close."""

    def __init__(self, rows: Tensor, d_model: int):
        super().__init__(rows, d_model)
        self.up = nn.Linear(rows.shape[1], d_model)
        self.down = nn.Linear(d_model, d_model)

    def embed(self, features: Tensor) -> Tensor:
        """Embed features (b, f) as (b, d)."""
        return self.down(F.silu(self.up(features)))

    def initialise(self) -> None:
        """Draw the weights; features are about 1 in size, so that the hidden units are too."""
        nn.init.normal_(self.null, std=TABLE_STD)
        nn.init.normal_(self.up.weight, std=self.up.in_features**-0.5)
        nn.init.normal_(self.down.weight, std=TABLE_STD / (0.6 * self.down.in_features**0.5))  # silu halves a normal
        nn.init.zeros_(self.up.bias)
        nn.init.zeros_(self.down.bias)


class PooledEmbedding(FeatureEmbedding):
    """Sum of the embeddings of a set's members, whatever their order."""

    def __init__(self, rows: Tensor, d_model: int):
        super().__init__(rows, d_model)
        self.members = nn.Linear(rows.shape[1], d_model, bias=False)

    def embed(self, features: Tensor) -> Tensor:
        """Embed features (b, f) as (b, d)."""
        return self.members(features)

    def initialise(self) -> None:
        """Draw a vector for each member."""
        nn.init.normal_(self.null, std=TABLE_STD)
        nn.init.normal_(self.members.weight, std=TABLE_STD)


def _expand_to_cells(modulation: Tensor, rows: Tensor | None) -> Tensor:
    """Expand one row per distinct condition (u, k d) to one per cell (b, k d)."""
    return modulation if rows is None else modulation.index_select(0, rows)


class DiTBlock(nn.Module):
    """Transformer block whose norms have no weights of their own: the condition scales, shifts and gates them."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.norm_attention = nn.LayerNorm(config.d_model, eps=config.eps, elementwise_affine=False)
        self.attention = SelfAttention(config.d_model, config.n_heads, bias=config.bias)
        self.norm_mlp = nn.LayerNorm(config.d_model, eps=config.eps, elementwise_affine=False)
        self.mlp = SwiGLU(config.d_model, config.multiple_of)
        self.adaln = nn.Linear(config.d_model, 6 * config.d_model)

    def forward(self, x: Tensor, c: Tensor, rows: Tensor | None = None) -> Tensor:
        """Apply the block to x (b, m, d), conditioned on c (b, d), or on c (u, d) with `rows` (b,) indexing it."""
        scale_a, shift_a, gate_a, scale_m, shift_m, gate_m = _expand_to_cells(self.adaln(c), rows).chunk(6, dim=-1)
        y = modulate(self.norm_attention(x), shift=shift_a, scale=scale_a)
        x = torch.addcmul(x, gate_a.unsqueeze(1), self.attention(y))
        y = modulate(self.norm_mlp(x), shift=shift_m, scale=scale_m)
        return torch.addcmul(x, gate_m.unsqueeze(1), self.mlp(y))


class DiTHead(nn.Module):
    """Modulated norm and projection back to the latent width."""

    def __init__(self, config: DiTConfig, latent_width: int):
        super().__init__()
        self.norm = nn.LayerNorm(config.d_model, eps=config.eps, elementwise_affine=False)
        self.adaln = nn.Linear(config.d_model, 2 * config.d_model, bias=config.bias)
        self.linear = nn.Linear(config.d_model, latent_width, bias=config.bias)

    def forward(self, x: Tensor, c: Tensor, rows: Tensor | None = None) -> Tensor:
        """Project x (b, m, d) to (b, m, e), conditioned as in `DiTBlock.forward`."""
        shift, scale = _expand_to_cells(self.adaln(c), rows).chunk(2, dim=-1)
        return self.linear(modulate(self.norm(x), shift=shift, scale=scale))


class DiT(nn.Module):
    """adaLN-zero transformer (Peebles and Xie 2023) over the latent tokens of a cell."""

    positions: Tensor
    precision: Precision | None = None  # of the blocks; embeddings of time and labels are rows, and stay fp32

    def __init__(
        self,
        config: DiTConfig,
        *,
        n_latent_tokens: int,
        latent_width: int,
        n_classes: Mapping[str, int],
        features: Mapping[str, ClassFeatures] | None = None,
        from_controls: bool = False,
    ) -> None:
        """Build the network with new weights.

        Args:
            config: Sizes and strategy.
            n_latent_tokens: m.
            latent_width: e.
            n_classes: Label to its number of classes.
            features: Label to the features of its classes, for labels whose classes are values; the others have tables.
            from_controls: Whether it also has a field that starts at control cells.
        """
        super().__init__()
        if config.d_model % 2:
            raise ValueError(f"d_model ({config.d_model}) must be even: half of the positions are sines, half cosines")
        self.config = config
        self.n_classes = dict(n_classes)
        self.strategy = config.strategy
        self.input = nn.Linear(latent_width, config.d_model, bias=config.bias)
        self.register_buffer("positions", sincos_positions(n_latent_tokens, config.d_model))
        self.time = TimeEmbedding(config.d_model)
        self.labels = nn.ModuleDict(
            {
                label_table_name(label): _label_module(n, config.d_model, (features or {}).get(label))
                for label, n in self.n_classes.items()
            }
        )
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.n_layers))
        self.head = DiTHead(config, latent_width)
        self.from_controls = nn.Parameter(torch.zeros(config.d_model)) if from_controls else None
        self._initialise()

    def forward(
        self, x_t: Tensor, t: Tensor, conditions: Mapping[str, Tensor], from_control: Tensor | None = None
    ) -> Tensor:
        """Predict at x_t (b, m, e), time t (b,), with ids (b,) per label. Ids are not checked: see `validate_ids`.

        Args:
            from_control: Which cells start at control cells, bool (b,); None: none.
        """
        check_labels(conditions, self.n_classes)
        c = self.time(t) + self._label_embedding(conditions)  # (b, d)
        if from_control is not None:
            vector = self._control_vector()
            c = c + from_control.to(vector.dtype).unsqueeze(1) * vector
        return self._body(x_t, F.silu(c), None)

    def at_one_time(
        self, conditions: Mapping[str, Tensor], *, from_controls: bool = False
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the network with its conditions fixed, for a solver: a function of x_t (b, m, e) and of t (b,), all
        equal.

        Time and modulations are computed once per distinct combination of labels instead of once per cell, which is
        exact. Reads the conditions on the host, once.

        Args:
            conditions: Label to ids (b,).
            from_controls: Whether all cells start at control cells.
        """
        check_labels(conditions, self.n_classes)
        if not conditions:
            labels, rows = self._label_embedding({})[None], None
        else:
            names = list(conditions)
            distinct, rows = torch.unique(
                torch.stack([conditions[name] for name in names], dim=1), dim=0, return_inverse=True
            )
            labels = self._label_embedding(dict(zip(names, distinct.unbind(1), strict=True)))  # (u, d)
        if from_controls:
            labels = labels + self._control_vector()
        if len(labels) == 1:
            rows = None  # one modulation for all: it broadcasts
        return lambda x_t, t: self._body(x_t, F.silu(self.time(t[:1]) + labels), rows)

    @in_own_precision
    def _body(self, x_t: Tensor, c: Tensor, rows: Tensor | None) -> Tensor:
        """Predict under conditioning c (b, d), or c (u, d) with `rows` (b,) as each cell's index."""
        x = self.input(x_t.to(self.input.weight.dtype)) + self.positions  # noise and latents stay fp32 in bf16 training
        for block in self.blocks:
            x = block(x, c, rows)
        return self.head(x, c, rows)

    def _label_embedding(self, conditions: Mapping[str, Tensor]) -> Tensor:
        """Return the sum over labels, null if absent: (b, d), or (d,) if no label is given."""
        total = self.head.adaln.weight.new_zeros(self.config.d_model)
        for label, n in self.n_classes.items():
            table = self.labels[label_table_name(label)]
            if label in conditions:
                total = total + table(conditions[label])
            else:
                total = total + (table.null if isinstance(table, FeatureEmbedding) else table.weight[n])
        return total

    def with_classes(self, features: Mapping[str, ClassFeatures]) -> DiT:
        """Return the network with other classes of labels that are values, sharing all its weights.

        Args:
            features: Label to the features of its classes; the null id becomes their number.
        """
        shared = {id(x): x for x in (*self.parameters(), *self.buffers())}
        other = copy.deepcopy(self, shared)
        for label, given in features.items():
            table = other.labels[label_table_name(label)]
            if not isinstance(table, FeatureEmbedding):
                raise ValueError(f"label {label!r} has a table of classes, and its classes are no values")
            table.set_classes(given.rows)
            other.n_classes[label] = len(given.rows)
        return other

    def _control_vector(self) -> Tensor:
        if self.from_controls is None:
            raise ValueError("this network was trained from noise only: it has no field that starts at control cells")
        return self.from_controls

    def _initialise(self) -> None:
        """Initialise linear layers by Xavier, tables and time by small normals, the gates and the head by zeros.

        Draws from torch's global generator, as every torch layer does: seed it before the model is built.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=TABLE_STD)
        for table in self.labels.values():
            if isinstance(table, FeatureEmbedding):
                table.initialise()
        for linear in (self.time.up, self.time.down):
            nn.init.normal_(linear.weight, std=0.02)
        for linear in (*(block.adaln for block in self.blocks), self.head.adaln, self.head.linear):
            nn.init.zeros_(linear.weight)


def _label_module(n: int, d_model: int, features: ClassFeatures | None) -> nn.Module:
    if features is None:
        return nn.Embedding(n + 1, d_model)
    if len(features.rows) != n:
        raise ValueError(f"features of {len(features.rows)} classes were given for a label of {n}")
    return (PooledEmbedding if features.pooled else ValueEmbedding)(features.rows, d_model)


def check_labels(conditions: Mapping[str, Tensor], n_classes: Mapping[str, int]) -> None:
    """Raise ValueError if a label is unknown. Compares names only: no host sync."""
    unknown = sorted(set(conditions) - set(n_classes))
    if unknown:
        raise ValueError(f"conditions: unknown labels {unknown}; the model knows {sorted(n_classes)}")


def validate_ids(conditions: Mapping[str, Tensor], n_classes: Mapping[str, int], *, strategy: Strategy) -> None:
    """Raise ValueError if a label is unknown, an id out of range, or several exclusive labels are set for one cell.

    Reads the ids on the host: call it on the user's table of conditions, not in a training step.
    """
    check_labels(conditions, n_classes)
    for label, ids in conditions.items():
        n = n_classes[label]
        if ids.dtype not in (torch.int32, torch.int64) or ids.ndim != 1:
            raise ValueError(f"conditions[{label!r}] must be integer ids (b,); got {ids.dtype} {tuple(ids.shape)}")
        bad = ids[(ids < 0) | (ids > n)]
        if len(bad):
            raise ValueError(f"conditions[{label!r}] holds id {int(bad[0])}; allowed are 0..{n - 1}, and {n} for null")
    if strategy == "mutually_exclusive" and conditions:
        n_set = sum((ids != n_classes[label]).int() for label, ids in conditions.items())
        if int(n_set.max()) > 1:
            cell = int(n_set.argmax())
            raise ValueError(f"conditions of cell {cell} set {int(n_set[cell])} labels; mutually_exclusive allows one")


def drop_labels(
    conditions: Mapping[str, Tensor],
    n_classes: Mapping[str, int],
    *,
    p: float,
    strategy: Strategy,
    generator: torch.Generator | None = None,
    uniform: Tensor | None = None,
    joint_dropout: JointDropout = "all_then_each",
) -> dict[str, Tensor]:
    """Replace ids by the null class at random, per cell.

    mutually_exclusive: one of the labels that a cell has is kept, drawn evenly; with probability p it is dropped too.
    joint, all_then_each: with probability p all labels are dropped; else each is dropped with probability p on its own,
    so that the model also learns partial conditions. all: with probability p all, else none (upstream). each: each on
    its own.

    Args:
        conditions: Label to ids (b,).
        n_classes: Label to its number of classes, which is the null id.
        p: Probability in [0, 1].
        strategy: How labels are combined.
        generator: Source of the draws, which are on its device. Give this or `uniform`.
        uniform: The draws, (b, 1 + n_labels): one for the cell, then one per label of the model, alphabetically.
        joint_dropout: Which labels are dropped together.
    """
    check_labels(conditions, n_classes)
    if not 0 <= p <= 1:
        raise ValueError(f"p ({p}) must be a probability in [0, 1]")
    if not conditions:
        return {}
    labels = sorted(conditions)  # the draws must not depend on the order of a mapping
    ids = torch.stack([conditions[label] for label in labels])  # (labels, b)
    null = torch.stack([torch.full_like(conditions[label], n_classes[label]) for label in labels])
    coins = _coins(ids.shape[1], 1 + len(n_classes), generator, uniform).to(ids.device).T  # (1 + n_labels, b)
    rows = {label: row for row, label in enumerate(sorted(n_classes), start=1)}
    together, each = coins[0], torch.stack([coins[rows[label]] for label in labels])
    dropped = _dropped(together, each, ids == null, p=p, rule=joint_dropout if strategy == "joint" else strategy)
    return dict(zip(labels, torch.where(dropped, null, ids), strict=True))


def _coins(b: int, n: int, generator: torch.Generator | None, uniform: Tensor | None) -> Tensor:
    if generator is not None and uniform is None:
        return torch.rand(b, n, generator=generator, device=generator.device)
    if generator is not None or uniform is None:
        raise ValueError("drop_labels takes either a generator or uniform draws")
    if uniform.shape != (b, n):
        raise ValueError(f"uniform must be (b, 1 + n_labels) = {(b, n)}; got {tuple(uniform.shape)}")
    return uniform


def _dropped(together: Tensor, each: Tensor, absent: Tensor, *, p: float, rule: str) -> Tensor:
    """Return which labels of which cells are dropped, (labels, b).

    Decided by the uniform draws of the cells (b,) and of their labels (labels, b).
    """
    if rule == "all":
        return (together < p).expand_as(each)
    if rule == "each":
        return each < p
    if rule == "all_then_each":
        return (together < p) | (each < p)
    # Draws of absent labels are made negative, so that the largest is an even draw among the labels a cell has.
    kept = torch.where(absent, -1.0, each).argmax(dim=0)  # (b,)
    return (together < p) | (torch.arange(len(each), device=each.device).unsqueeze(1) != kept)
