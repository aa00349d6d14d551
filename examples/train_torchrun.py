"""The demo's character model, trained by several processes that share the batches.

    torchrun --standalone --nproc-per-node 2 examples/train_torchrun.py
    torchrun --standalone --nproc-per-node 2 examples/train_torchrun.py --shard     # FSDP2 in place of DDP

On GPUs each process takes one of its own; on CPUs they share the cores.
"""

from __future__ import annotations

import argparse
import gc
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import rnnkern
from rnnkern.demo import CharacterModel, read_text


def train(device: torch.device, args: argparse.Namespace) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    text = read_text(None, args.length, device)
    torch.manual_seed(0)  # the same weights everywhere
    model: nn.Module = CharacterModel(rnnkern.LSTM(args.hidden, args.hidden), len(text.alphabet)).to(device)
    if args.shard:
        fully_shard(model.rnn)
        fully_shard(model)
    else:
        model = DistributedDataParallel(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

    for step, (x, target) in enumerate(text.batches(args.steps, args.batch * world, args.length, seed=0), 1):
        mine = slice(rank * args.batch, (rank + 1) * args.batch)
        logits, _ = model(x[:, mine])
        loss = cross_entropy(logits.flatten(0, 1), target[:, mine].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if rank == 0 and (step % 10 == 0 or step == args.steps):
            print(f"step {step}: loss {loss.item():.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 256), ("batch", 16), ("length", 64), ("steps", 100)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--shard", action="store_true", help="shard the weights (FSDP2); else every process has all")
    args = parser.parse_args()

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    train(device, args)
    # After the model is gone, cycles and all: what outlives its process group can wait for gloo's threads for ever, or
    # be given up by one of them as Python ends, which aborts.
    gc.collect()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
