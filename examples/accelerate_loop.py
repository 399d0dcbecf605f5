"""Accelerate: the optimizer before or after `prepare`, accumulation, clipping, and a state that resumes."""

import sys

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import natgrad

torch.manual_seed(0)
accelerator = Accelerator(gradient_accumulation_steps=2)  # opens the process group, so it comes first
model = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 3))
optimizer = natgrad.SPNGD(model, lr=0.1)  # it follows the model to the device
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 32)
x = torch.randn(256, 10)
data = DataLoader(TensorDataset(x, (x @ torch.randn(10, 3)).argmax(1)), batch_size=32)
data, model, optimizer, schedule = accelerator.prepare(data, model, optimizer, schedule)
losses = []
for _epoch in range(8):
    for inputs, labels in data:
        with accelerator.accumulate(model):
            loss = F.cross_entropy(model(inputs), labels)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
folder = sys.argv[1] if len(sys.argv) > 1 else "runs/accelerate_loop"
accelerator.save_state(folder)  # on several ranks too: under averaged gradients each rank keeps the whole state
accelerator.load_state(folder)
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
