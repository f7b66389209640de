"""Train on several workers: torchrun --nproc-per-node=4 examples/minimal.py"""

import os

import torch
import torch.distributed as dist
from torch import nn

import gmc_cuda

dist.init_process_group()  # NCCL for CUDA tensors, gloo for CPU tensors
rank, device = dist.get_rank(), torch.device("cpu")
if torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"]):  # a GPU for each worker
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)

torch.manual_seed(0)
teacher = nn.Linear(64, 10).to(device)
model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 10)).to(device)
optimizer = gmc_cuda.GMC(model.parameters(), lr=0.5, momentum=0.5, density=0.01)

torch.manual_seed(rank)  # from here on every worker draws numbers of its own
for step in range(1, 301):
    x = torch.randn(32, 64, device=device)
    loss = nn.functional.mse_loss(model(x), teacher(x).detach())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()  # compress, exchange, apply: the same weights on every worker
    if rank == 0 and step % 100 == 0:
        print(f"step {step}: loss {loss.item():.4f}, sent {optimizer.stats()['link_bytes_sent']} B")
dist.destroy_process_group()
