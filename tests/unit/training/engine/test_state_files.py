"""Pieces of parameters on disk, assembled for any number of workers."""

from __future__ import annotations

import hashlib

import pytest
import torch
from safetensors.torch import load_file

from pipeline.training.engine.partitions import STEP, WEIGHT, Flat, Piece
from pipeline.training.engine.state_files import Shards, shard_name, shard_tensors, write_tensors


def test_the_file_is_safetensors_and_its_size_and_hash_are_true(tmp_path):
    tensors = {
        "a": torch.randn(3, 4), "b": torch.arange(5), "empty": torch.zeros(0),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "scalar": torch.tensor(2.0), "cut": torch.arange(12.0).view(3, 4)[:, 1:3],
    }  # fmt: skip
    size, sha256 = write_tensors(tmp_path / "x.safetensors", tensors)
    data = (tmp_path / "x.safetensors").read_bytes()
    assert (size, sha256) == (len(data), hashlib.sha256(data).hexdigest())
    for name, tensor in load_file(tmp_path / "x.safetensors").items():
        torch.testing.assert_close(tensor, tensors[name], rtol=0, atol=0)


def partitions(parameters: dict[str, torch.Tensor], n: int) -> list[list[Flat]]:
    """Partition the parameters as ZeRO 1 and 2 do: end to end, padded, in n equal parts."""
    total = sum(p.numel() for p in parameters.values())
    size = -(-total // n)
    whole = torch.cat([*(p.reshape(-1) for p in parameters.values()), torch.zeros(n * size - total)])
    ranks = []
    for rank in range(n):
        pieces, at = [], 0
        for name, p in parameters.items():
            start, stop = max(at, rank * size), min(at + p.numel(), (rank + 1) * size)
            if start < stop:
                pieces.append(Piece(name, start - at, stop - start, start - rank * size))
            at += p.numel()
        ranks.append([Flat(whole[rank * size : (rank + 1) * size].clone(), pieces, replicated=False)])
    return ranks


def optimizer_of(flat: Flat) -> torch.optim.AdamW:
    """Make an optimizer whose state differs in every element."""
    optimizer = torch.optim.AdamW([flat.tensor])
    optimizer.state[flat.tensor] = {
        "step": torch.tensor(7.0), "exp_avg": flat.tensor * 2, "exp_avg_sq": flat.tensor.square(),
    }  # fmt: skip
    return optimizer


@pytest.mark.parametrize(("writers", "readers"), [(1, 3), (2, 1), (2, 2), (3, 2), (4, 5)])
def test_any_number_of_workers_reads_what_any_number_wrote(tmp_path, writers, readers):
    parameters = {"a": torch.randn(7, 3), "b": torch.randn(5), "layer/c": torch.randn(2, 2)}
    for rank, flats in enumerate(partitions(parameters, writers)):
        optimizer, buffers = optimizer_of(flats[0]), {"buffer": torch.arange(3)}
        tensors = shard_tensors(flats, optimizer, buffers, rank=rank, world_size=writers)
        write_tensors(tmp_path / shard_name(rank, writers), tensors)
    shards = Shards(tmp_path)
    for flats in partitions(parameters, readers):
        expected, flat = flats[0].tensor.clone(), flats[0]
        flat.tensor.zero_()
        optimizer = torch.optim.AdamW([flat.tensor])
        flat.fill(optimizer, shards.fields)
        assert torch.equal(flat.tensor, expected)
        assert float(optimizer.state[flat.tensor]["step"]) == 7
        assert torch.equal(optimizer.state[flat.tensor]["exp_avg"], expected * 2)
        assert torch.equal(optimizer.state[flat.tensor]["exp_avg_sq"], expected.square())
    assert torch.equal(shards.weight("layer/c", torch.Size([2, 2])), parameters["layer/c"])
    assert torch.equal(shards.whole("buffer"), torch.arange(3))


def test_replicated_state_is_written_once(tmp_path):
    flats = [Flat(torch.randn(3), [Piece(name, 0, 3, 0)], replicated=True) for name in "abc"]
    optimizer = torch.optim.AdamW([flat.tensor for flat in flats])
    written = [shard_tensors(flats, optimizer, {}, rank=rank, world_size=2) for rank in (0, 1)]
    assert [sorted(w) for w in written] == [["weight/0/a", "weight/0/c"], ["weight/0/b"]]


@pytest.mark.row("C10")
def test_a_missing_piece_is_named(tmp_path):
    write_tensors(tmp_path / shard_name(0, 2), {f"{WEIGHT}/0/a": torch.zeros(4), f"{STEP}/0/a": torch.tensor(1.0)})
    shards = Shards(tmp_path)
    with pytest.raises(KeyError, match="weight of a up to element 4 only; 6 are needed"):
        shards.fields(Piece("a", 2, 4, 0))
    with pytest.raises(KeyError, match="no weights of b"):
        shards.fields(Piece("b", 0, 1, 0))


def test_an_optimizer_that_counts_with_integers_resumes_its_count(tmp_path):
    from scldm.optim.adamw import CautiousAdamW

    flat = Flat(torch.ones(3), [Piece("a", 0, 3, 0)], replicated=True)
    optimizer = CautiousAdamW([flat.tensor])
    flat.tensor.grad = torch.ones(3)
    optimizer.step()
    write_tensors(tmp_path / shard_name(0, 1), shard_tensors([flat], optimizer, {}, rank=0, world_size=1))
    before = optimizer.state.pop(flat.tensor)
    flat.fill(optimizer, Shards(tmp_path).fields)
    after = optimizer.state[flat.tensor]
    assert after["step"] == 1
    assert isinstance(after["step"], int)
    assert torch.equal(after["first"], before["first"])
