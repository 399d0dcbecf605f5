"""Ranks with unlike numbers of batches: torch's Join. torchrun --nproc-per-node 2 examples/join.py"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.nn import functional as F

import natgrad

dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
rank = dist.get_rank()
device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
torch.manual_seed(0)
model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 3)).to(device))
optimizer = natgrad.SPNGD(model, lr=0.1)
x, w = torch.randn(512, 10, device=device), torch.randn(10, 3, device=device)
own = x[:320] if rank == 0 else x[320:]  # ten batches, and six
losses = []
for _epoch in range(4):
    with Join([model, optimizer]):
        for batch in own.split(32):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(batch), (batch @ w).argmax(1))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
if rank == 0:
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
dist.destroy_process_group()
