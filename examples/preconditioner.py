"""natgrad in front of the optimizer that a project has: natural gradients, a scaled loss, clipping, AdamW."""

import torch
from torch import nn
from torch.nn import functional as F

import natgrad

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
model = nn.Sequential(nn.Linear(10, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 3)).to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
scaler = torch.amp.GradScaler(device)
preconditioner = natgrad.Preconditioner(model, curvature=natgrad.spngd_blocks, scaler=scaler)
x = torch.randn(256, 10, device=device)
y = (x @ torch.randn(10, 3, device=device)).argmax(1)
losses = []
for _ in range(40):
    optimizer.zero_grad()
    with torch.autocast(device, torch.float16 if device == "cuda" else torch.bfloat16):
        loss = F.cross_entropy(model(x), y)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    preconditioner.step()  # .grad is a natural gradient from here on
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    losses.append(loss.item())
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
