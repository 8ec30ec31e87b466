"""Several processes that train one model, each on a device of its own: for models that do not fit one GPU.

What is frozen or fully trained is sharded (FSDP2, `torch.distributed.fsdp.fully_shard`): each process keeps a part of
each weight and fetches a layer when its turn comes. Adapters and new heads are small; every process has them whole, so
the code that arranges, saves and sends them need not know of this at all. A base model in 4 or 8 bits is whole too:
bitsandbytes' packed weights have no rows to shard.

Every process runs the same task with the same rows (client_agent/training/team.py starts them and ends them). Of each
batch it takes every n-th row. A loss is a sum divided by what the whole batch counts, so gradients and losses are those
of one process up to the order of their sums. Only the first one reports and writes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from protos.errors import Conflict, OutOfSpace

# The first process may wait for its disk for days, and the others for it; who dies is noticed by its pipe.
COLLECTIVE_TIMEOUT = timedelta(days=365)


@dataclass(frozen=True)
class Group:
    """The processes of a task, seen from one of them."""

    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = field(default=None, compare=False)

    @property
    def leads(self) -> bool:
        return self.rank == 0

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """One process after the other: the CPU's memory need hold a whole model only once."""
        for turn in range(self.size):
            if turn == self.rank:
                yield
            if self.mesh:
                dist.barrier()

    def parts(self, rows: Tensor, *, micro_batch_size: int) -> list[tuple[Tensor, int]]:
        """This process's rows of a batch, part by part, and 1: they count.

        Each process gets as many parts, because all take each step together; who has none left computes one row more,
        with 0.
        """
        parts = [(part, 1) for part in rows[self.rank :: self.size].split(micro_batch_size) if len(part)]
        most = len(rows[:: self.size].split(micro_batch_size))
        return parts + [(rows[:1], 0)] * (most - len(parts))

    def mean_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Of what every process has whole. FSDP does so by itself for what it shards."""
        found = [p.grad for p in parameters if p.grad is not None and not isinstance(p, DTensor)]
        if self.mesh and found:
            flat = torch.cat([gradient.reshape(-1) for gradient in found])
            dist.all_reduce(flat)
            flat /= self.size
            for gradient, mean in zip(found, flat.split([g.numel() for g in found]), strict=True):
                gradient.copy_(mean.view_as(gradient))

    def sum(self, value: Tensor) -> Tensor:
        """In place, at every process."""
        if self.mesh:
            dist.all_reduce(value)
        return value

    def told(self, number: int) -> int:
        """The first process's number, at every process."""
        if self.mesh:
            told = torch.tensor(number, device=self.mesh.device_type)
            dist.broadcast(told, src=0)
            number = int(told)
        return number

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """These tensors as the first process needs them to write them; at the others, which take part, nothing."""
        found = {}
        for name, tensor in tensors.items():
            values = tensor.detach()
            if isinstance(values, DTensor):
                values = values.full_tensor()
                values = values.cpu() if self.leads else values
            if self.leads:
                found[name] = values
        return found

    def gathered(self, value: Any) -> list[Any]:
        """Each process's value, in order."""
        values = [value] * self.size
        if self.mesh:
            dist.all_gather_object(values, value)
        return values

    def check_agree(self, work: str) -> None:
        """Conflict: they do not do the same work, and would wait for one another."""
        if len(set(self.gathered(work))) > 1:
            raise Conflict("The rows changed while the processes of this training read them.")

    def shard(self, network: nn.Module, *, device: torch.device) -> None:
        """Puts the network on the devices. Its parameters are replaced; tensors taken from it before are stale."""
        assert self.mesh is not None
        whole: set[nn.Parameter] = set()
        base: Any = network
        roots = [network]
        if isinstance(network, PeftModel):
            # PEFT calls the base model's `forward` past its hooks, so those that it calls in turn are sharded.
            base = network.get_base_model()
            roots = [child for child in base.children() if any(True for _ in child.parameters())]
            whole |= {parameter for parameter in network.parameters() if parameter.requires_grad}
            # Tied weights belong to two of them.
            counts = Counter(parameter for root in roots for parameter in root.parameters())
            whole |= {parameter for parameter, count in counts.items() if count > 1}
        layers = set(getattr(base, "_no_split_modules", None) or ())
        for module in [*(m for m in network.modules() if type(m).__name__ in layers), *roots]:
            if set(module.parameters()) - whole:
                fully_shard(module, mesh=self.mesh, ignored_params=whole)
        for tensor in [*whole, *network.buffers()]:
            tensor.data = tensor.data.to(device)


ALONE = Group()


def join(*, rank: int, size: int, device: torch.device, meeting: Path) -> Group:
    """This process's group, once all have come to `meeting`, a file that only they know of."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", store=dist.FileStore(str(meeting), size), rank=rank,
        world_size=size, timeout=COLLECTIVE_TIMEOUT, device_id=device if device.type == "cuda" else None,
    )  # fmt: skip
    return Group(rank, size, DeviceMesh(device.type, list(range(size))))


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def out_of_memory(rows: int) -> OutOfSpace:
    """For one process alone it is found out by trying how many rows fit; several would wait for one another."""
    return OutOfSpace(
        f"A GPU's memory is too small for {rows} row{'s' * (rows > 1)} at a time.",
        hint="Lower micro_batch_size under [local] in the recipe, or raise processes under [device] in site.toml.",
    )


def shard_like(tensor: Tensor, values: Tensor) -> Tensor:
    """`values`, which every process has whole, as they belong into `tensor`, which may be sharded."""
    if not isinstance(tensor, DTensor) or values.shape != tensor.shape:
        return values
    return distribute_tensor(values.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None)
