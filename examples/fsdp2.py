"""GMC under FSDP2: dense inside a node, sparse across nodes.

torchrun --nproc-per-node=4 examples/fsdp2.py --folder run --per-node 2 [--resume]

On real nodes --per-node is left out: torchrun knows how many workers each has.
"""

import argparse
import json
import os
import sysconfig
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import gmc_cuda


def windows():
    """Windows of 17 bytes of Python's standard library."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-d]*.py"))
    text = b"".join(file.read_bytes() for file in files)
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)[: 17 * 8000].view(-1, 17).long()


def batch(data, step, part, rank, size, count=16):
    """This worker's windows for the part-th of a step's backward passes."""
    first = ((4 * step + part) * size + rank) * count
    return data[torch.arange(first, first + count) % len(data)]


def make_model():
    """Predicts a byte from the 16 before it."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(256, 16), nn.Flatten(), nn.Linear(256, 128), nn.Tanh(), nn.Linear(128, 256)
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--per-node", type=int, default=int(os.environ["LOCAL_WORLD_SIZE"]))
    parser.add_argument("--density", type=float, default=0.02)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--save-every", type=int, default=20)
    parser.add_argument("--resume", action="store_true")
    options = parser.parse_args()

    dist.init_process_group()
    rank, size = dist.get_rank(), dist.get_world_size()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    mesh = init_device_mesh(
        device.type,
        (size // options.per_node, options.per_node),
        mesh_dim_names=("replicate", "shard"),
    )
    model = make_model().to(device)
    for layer in model:
        if isinstance(layer, (nn.Embedding, nn.Linear)):
            fully_shard(layer, mesh=mesh["shard"])  # of the node only: FSDP is silent across nodes
    fully_shard(model, mesh=mesh["shard"])
    optimizer = gmc_cuda.GMC(
        model.parameters(), lr=0.3, momentum=0.5, density=options.density, process_group=mesh
    )

    done = 0
    checkpoint = options.folder / "checkpoint"
    if options.resume:
        done = gmc_cuda.checkpoint.load(checkpoint, model, optimizer)["step"]
    losses, data = {}, windows().to(device)
    for step in range(done + 1, options.steps + 1):
        optimizer.zero_grad()
        total = torch.zeros((), device=device)
        for part in range(4):
            x = batch(data, step, part, rank, size)
            loss = F.cross_entropy(model(x[:, :-1]), x[:, -1]) / 4
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # each node its own gradient
        optimizer.step()
        dist.all_reduce(total)
        losses[step] = total.item() / size
        if step == options.save_every and not options.resume:
            gmc_cuda.checkpoint.save(checkpoint, model, optimizer, {"step": step})
    if rank == 0:
        (options.folder / "losses.json").write_text(json.dumps(losses))
        print(f"loss {losses[options.steps]:.3f}, {optimizer.stats()}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
