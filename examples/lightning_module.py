"""Lightning: `configure_optimizers` returns K-FAC and a schedule; accumulation and bf16 are the Trainer's."""

import sys

import lightning as L
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import natgrad


class Classifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(10, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 3))
        self.losses = []

    def training_step(self, batch, index):
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        # the network that is called, not the LightningModule around it; in mixed precision Lightning refuses
        # gradient_clip_val for an optimizer that unscales gradients itself, so max_norm= clips
        optimizer = natgrad.KFAC(self.net, lr=0.1, max_norm=1.0)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)]


torch.manual_seed(0)
x = torch.randn(256, 10)
data = DataLoader(TensorDataset(x, (x @ torch.randn(10, 3)).argmax(1)), batch_size=32)
module = Classifier()
options = {"precision": "bf16-mixed", "accumulate_grad_batches": 2}
folder = sys.argv[1] if len(sys.argv) > 1 else "runs/lightning_module"
trainer = L.Trainer(max_epochs=8, default_root_dir=folder, logger=False, enable_progress_bar=False, **options)
trainer.fit(module, data)
print(f"loss {module.losses[0]:.3f} -> {module.losses[-1]:.3f}")
