"""Hugging Face Trainer, as it is: SP-NGD by `optimizer_cls_and_kwargs`, with clipping, accumulation and checkpoints."""

import sys

import torch
from torch.utils.data import TensorDataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import natgrad

torch.manual_seed(0)
model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2))
tokens = (torch.randint(32, (64, 1)) + torch.arange(12)) % 32  # sequences that count
folder = sys.argv[1] if len(sys.argv) > 1 else "runs/hf_trainer"
trainer = Trainer(
    model,
    TrainingArguments(
        folder,
        use_cpu=not torch.cuda.is_available(),
        num_train_epochs=6,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        max_grad_norm=1.0,
        logging_steps=4,
        save_strategy="epoch",
        report_to=[],
        disable_tqdm=True,
    ),
    train_dataset=TensorDataset(tokens),
    data_collator=lambda rows: {"input_ids": (ids := torch.stack([row[0] for row in rows])), "labels": ids},
    # the class is called with what stands under "model"; params= is a name that the Trainer keeps for itself
    optimizer_cls_and_kwargs=(natgrad.SPNGD, {"model": model, "lr": 0.05, "weight_decay": 0.01}),
)
trainer.train()
losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
