"""A loop of one's own: bf16, micro-batches, clipping, a schedule, and running means of the weights (EMA)."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import natgrad

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
model = nn.Sequential(nn.Linear(10, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 3)).to(device)
optimizer = natgrad.SPNGD(model, lr=0.1, params=natgrad.decay_groups(model, 0.01))
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=30, cycle_momentum=False)
average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))  # a copy: no hook goes with it
x = torch.randn(256, 10, device=device)
y = (x @ torch.randn(10, 3, device=device)).argmax(1)
losses = []
for _ in range(30):
    for part in zip(x.chunk(4), y.chunk(4)):  # statistics add up as gradients do
        with torch.autocast(device, torch.bfloat16):
            loss = F.cross_entropy(model(part[0]), part[1]) / 4
        loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    average.update_parameters(model)
    losses.append(4 * loss.item())
with torch.no_grad():
    print(f"loss {losses[0]:.3f} -> {F.cross_entropy(average(x), y).item():.3f}")
