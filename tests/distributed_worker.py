"""One of the processes that test_distributed.py starts under torchrun: sharded training against a plain one."""

from __future__ import annotations

import copy
import datetime
import gc
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import rnnkern


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = rnnkern.LSTM(6, 8, 2, bidirectional=True)
        self.second = rnnkern.GRU(16, 8)
        self.cell = rnnkern.LSTMCell(8, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x)[0])[0]
        return self.head(self.cell(y[-1])[0])


def train(how: str) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    plain = Model().double()
    model = copy.deepcopy(plain)
    x = torch.randn(5, 4, 6, dtype=torch.float64)
    if how.startswith("fsdp"):
        for part in (model.first, model.second, model.cell, model):
            fully_shard(part)
        shared: nn.Module = model
    else:
        shared = DistributedDataParallel(model)
    if how.endswith("compiled"):
        torch._dynamo.config.allow_rnn = True
        shared = torch.compile(shared, backend="aot_eager")
    pairs = ((plain, [x[:, i::world] for i in range(world)]), (shared, [x[:, rank::world]]))
    for module, parts in pairs:
        optimizer = torch.optim.SGD(module.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            loss = sum(module(part).square().mean() for part in parts) / len(parts)
            loss.backward()
            optimizer.step()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        whole = p.full_tensor() if hasattr(p, "full_tensor") else p
        assert torch.allclose(whole, q, atol=1e-10), name
    with torch.no_grad():
        assert torch.allclose(shared(x), plain(x), atol=1e-10)
    print(f"{how}: rank {rank} of {world} agrees", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    for way in sys.argv[1:]:
        train(way)
    gc.collect()  # what FSDP2 leaves in cycles holds the process group, whose threads must not outlive Python
    dist.destroy_process_group()
