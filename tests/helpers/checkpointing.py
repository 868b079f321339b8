"""What the tests of checkpoints run in processes of their own: several ranks, one that is killed, a full disk."""

import contextlib
import resource
import time
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from granvit.train import checkpoint
from granvit.train.checkpoint import Checkpoints, load
from granvit.world import World

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


class Small(nn.Module):
    """Sizes that no number of ranks divides, one smaller than any, and an embedding that is also the head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.first = nn.Linear(6, 5)
        self.one = nn.Parameter(torch.randn(1, 6))
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, index: torch.Tensor) -> torch.Tensor:
        x = self.embed(index)
        return self.head(x * self.one + self.first(x).mean())


def small(seed: int) -> tuple[nn.Module, torch.optim.Optimizer, dict[str, torch.Tensor]]:
    """A sharded model after one step, its optimiser, and all their tensors beside plain ones."""
    torch.manual_seed(seed)
    model = fully_shard(Small())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    model(torch.arange(11)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    plain = {
        "plain.rows": torch.randn(7, 3),
        "plain.nothing": torch.randn(0, 3),
        "plain.step": torch.tensor(seed),
        "plain.rng": torch.get_rng_state(),
    }
    return model, optimizer, gathered(model, optimizer) | plain


def gathered(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    states = {
        "model": get_model_state_dict(model),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=FLAT),
    }
    return {
        f"{part}.{name}": tensor
        for part, state in states.items()
        for name, tensor in state.items()
        if isinstance(tensor, torch.Tensor)
    }


def whole(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone().contiguous()
        for name, t in tensors.items()
    }


def write(world: World, folder: Path) -> None:
    """A checkpoint, and what it should hold as folder/expected.safetensors."""
    rank, group = world.rank, world.control
    _, _, tensors = small(seed=1)
    assert any(isinstance(t, DTensor) for t in tensors.values())
    if rank == 0:
        save_file(whole(tensors), folder / "expected.safetensors")
    else:
        whole(tensors)
    checkpoints = Checkpoints(folder / "checkpoints", keep=1, world=world)
    checkpoints.save("adapt", 2, tensors, {"rank": rank})
    for _ in range(20):  # training goes on, and its collectives must not meet those of the writing
        total = torch.ones(2)
        dist.all_reduce(total, group=group)
        dist.all_reduce(total)
        assert total.tolist() == [4.0, 4.0]
    checkpoints.save("adapt", 3, tensors, {"rank": rank}, final=True)
    assert checkpoints.failures == 0
    assert checkpoints.final("adapt") == folder / "checkpoints" / "adapt-0000003-final"


def fail(world: World, folder: Path) -> None:
    """One rank can't write; then one gives other tensors than the other."""
    rank = world.rank
    tensors = {f"t{i}": torch.full((100 + i,), float(i)) for i in range(5)}
    checkpoints = Checkpoints(folder, keep=2, world=world)
    checkpoints.save("adapt", 1, tensors, {})
    checkpoints.wait()
    whole_writer = checkpoint.save_file
    if rank == 1:

        def full(*_, **__):
            raise OSError(28, "No space left on device")

        checkpoint.save_file = full
    for failures in (1, 2):
        checkpoints.save("adapt", 2, tensors, {})
        checkpoints.wait()
        assert checkpoints.failures == failures
        if rank == 0:  # which cleans up; the other need not have seen that yet
            assert sorted(p.name for p in folder.glob("*adapt*")) == ["adapt-0000001"]
    checkpoint.save_file = whole_writer
    checkpoints.save("adapt", 2, tensors, {}, final=True)
    assert checkpoints.failures == 0 and checkpoints.final("adapt") is not None
    with contextlib.suppress(ValueError):
        checkpoints.save("adapt", 3, tensors if rank == 0 else {"t0": tensors["t0"]}, {})
        raise AssertionError("other tensors on rank 1 went unseen")
    got = {name: torch.zeros_like(t) for name, t in tensors.items()}
    load(checkpoints.newest("adapt"), got, world=world)
    assert all(torch.equal(got[name], tensors[name]) for name in tensors)


def read(world: World, folder: Path) -> None:
    """The checkpoint into another sharding; then a damaged one, which no rank takes anything from."""
    rank, group = world.rank, world.control
    path = folder / "checkpoints" / "adapt-0000003-final"
    expected = load_file(folder / "expected.safetensors")
    model, optimizer, tensors = small(seed=2)
    assert load(path, tensors, world=world) == {"rank": 0}
    got = whole(tensors)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].dtype == value.dtype and torch.equal(got[name], value), name
    state = {n.removeprefix("optimizer."): t for n, t in tensors.items() if n.startswith("optimizer.")}
    rest = {n: v for n, v in get_optimizer_state_dict(model, optimizer, options=FLAT).items() if n not in state}
    set_optimizer_state_dict(model, optimizer, state | rest, options=FLAT)
    again = whole(gathered(model, optimizer))  # so model and optimiser themselves were filled
    assert all(torch.equal(value, expected[name]) for name, value in again.items())

    _, _, tensors = small(seed=2)
    before = whole(tensors)
    if rank == 0:
        file = path / "rank-00001.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    dist.barrier(group)
    try:
        load(path, tensors, world=world)
    except ValueError as error:
        assert "rank-00001.safetensors is damaged" in str(error)
    else:
        raise AssertionError(f"rank {rank} took a damaged file")
    assert all(torch.equal(value, before[name]) for name, value in whole(tensors).items())


def hang_while_writing(folder: Path) -> None:
    """One checkpoint, then half of another; says so, and waits to be killed."""
    checkpoints = Checkpoints(folder, keep=2)
    checkpoints.save("adapt", 1, {"w": torch.ones(1000)}, {"step": 1})
    checkpoints.wait()

    def half(tensors, path, metadata):
        Path(path).write_bytes(b"half of it")
        print("writing", flush=True)
        time.sleep(60)

    checkpoint.save_file = half
    checkpoints.save("adapt", 2, {"w": torch.zeros(1000)}, {"step": 2})
    checkpoints.wait()


def end_while_writing(folder: Path) -> None:
    """A checkpoint that is not waited for, on a slow disk."""
    whole_writer = checkpoint.save_file

    def slow(*args, **kwargs):
        time.sleep(1)
        whole_writer(*args, **kwargs)

    checkpoint.save_file = slow
    Checkpoints(folder, keep=1).save("adapt", 1, {"w": torch.ones(1000)}, {"step": 1})


def fill_the_disk(folder: Path) -> None:
    """A checkpoint, two for which a file may not grow large enough, and one more when it may."""
    tensors = {"w": torch.ones(1 << 16)}
    checkpoints = Checkpoints(folder, keep=1)
    checkpoints.save("adapt", 1, tensors, {})
    checkpoints.wait()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limit[1]))  # Python ignores SIGXFSZ: writes raise EFBIG
    for failures in (1, 2):
        checkpoints.save("adapt", 2, tensors, {})
        checkpoints.wait()
        assert checkpoints.failures == failures
        assert [p.name for p in folder.iterdir()] == ["adapt-0000001"]
        load(checkpoints.newest("adapt"), tensors)
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    checkpoints.save("adapt", 3, tensors, {})
    checkpoints.wait()
    assert checkpoints.failures == 0 and [p.name for p in folder.iterdir()] == ["adapt-0000003"]
