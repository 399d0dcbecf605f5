"""Trainers beside a hand-written loop: the same weights to the last bit, on one rank and on two.

    python benchmarks/trainers.py --out benchmarks/results/trainers.json     (needs the extra `integrations`)

Every run makes STEPS steps of SP-NGD on the same batches on one thread. `clip` is the trainer's own clipping,
`max_norm` the optimizer's. `compile` is the trainer's own way to torch.compile (inductor), with steps between
measurements, which run compiled. `resume` stops after half of the steps, and goes on with new objects from the
checkpoint that the trainer has written by itself. On two ranks the loop is one of DistributedDataParallel. `memory` is
what a rank keeps: where each rank keeps everything (the default under averaged gradients) and where layers are divided
(World(owners=True)).
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
import warnings
from importlib import metadata, util
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.distributed as dist  # noqa: TID251  (as a loop of one's own does)
from record import git, machine
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

import natgrad

STEPS, PARTS, ROWS, CLIP = 6, 2, 8, 0.05
BF16 = {"bf16", "bf16, clip", "bf16, max_norm"}
CLIPPED = {"clip", "bf16, clip"}
WAYS = ("plain", "accumulate", "clip", "bf16", "bf16, clip", "bf16, max_norm", "compile", "resume")
TRAINERS = {"lightning": "lightning", "accelerate": "accelerate", "transformers": "transformers"}


class Net(nn.Module):
    """A network that returns its loss, as transformers' models do."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(10, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, x, labels):
        logits = self.body(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def made():
    torch.manual_seed(0)
    return Net()


def options_of(way):
    """What the optimizer is given."""
    chosen = {"bf16, max_norm": {"max_norm": CLIP}, "compile": {"refresh": 2}}
    return {"lr": 0.05, **chosen.get(way, {})}


def optimizer_of(model, way):
    return natgrad.SPNGD(model, **options_of(way))


def batches(way, rank, ranks):
    """This rank's batches of the whole run: {"x", "labels"}."""
    count = STEPS * (PARTS if way == "accumulate" else 1)
    generator = torch.Generator().manual_seed(1)
    x, w = torch.randn(count, ranks, ROWS, 10, generator=generator), torch.randn(10, 3, generator=generator)
    return [{"x": own[rank], "labels": (own[rank] @ w).argmax(1)} for own in x]


class Rows(torch.utils.data.Dataset):
    def __init__(self, found):
        self.rows = [{k: v[i] for k, v in batch.items()} for batch in found for i in range(ROWS)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, k):
        return self.rows[k]


def loader(found):
    return torch.utils.data.DataLoader(Rows(found), batch_size=ROWS)


def by_hand(way, rank, ranks, folder):
    model = made()
    outer = nn.parallel.DistributedDataParallel(model) if ranks > 1 else model
    outer = torch.compile(outer) if way == "compile" else outer
    opt, parts = optimizer_of(model, way), PARTS if way == "accumulate" else 1
    for k, batch in enumerate(batches(way, rank, ranks)):
        last = (k + 1) % parts == 0
        with (
            outer.no_sync() if ranks > 1 and not last else contextlib.nullcontext(),
            torch.autocast("cpu", torch.bfloat16, enabled=way in BF16),
        ):
            loss = outer(**batch)["loss"] / parts
            loss.backward()
        if last:
            if way in CLIPPED:
                nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            opt.step()
            opt.zero_grad()
    return model


def lightning(way, rank, ranks, folder):
    import lightning as L

    class Module(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = made()

        def training_step(self, batch, index):
            return self.net(**batch)["loss"]

        def configure_optimizers(self):
            return optimizer_of(self.net, way)

    def fit(found, epochs=1, checkpoint=None):
        module = Module()
        trainer = L.Trainer(
            accelerator="cpu",
            devices=ranks,
            strategy="ddp" if ranks > 1 else "auto",
            max_epochs=epochs,
            precision="bf16-mixed" if way in BF16 else "32-true",
            accumulate_grad_batches=PARTS if way == "accumulate" else 1,
            gradient_clip_val=CLIP if way in CLIPPED else None,
            use_distributed_sampler=False,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        outer = torch.compile(module) if way == "compile" else module
        trainer.fit(outer, loader(found), ckpt_path=checkpoint)
        return trainer, module.net

    found = batches(way, rank, ranks)
    if way != "resume":
        return fit(found)[1]
    trainer, _ = fit(found[: STEPS // 2])  # an epoch each: Lightning begins the data anew within one
    trainer.save_checkpoint(f"{folder}/half.ckpt")
    return fit(found[STEPS // 2 :], 2, f"{folder}/half.ckpt")[1]


def accelerate(way, rank, ranks, folder):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    def begin(late):
        AcceleratorState._reset_state()
        GradientState._reset_state()
        parts = PARTS if way == "accumulate" else 1
        accelerator = Accelerator(
            cpu=True,
            mixed_precision="bf16" if way in BF16 else "no",
            gradient_accumulation_steps=parts,
            dynamo_backend="inductor" if way == "compile" else "no",
        )
        model = made()
        if late:  # in any order
            outer = accelerator.prepare(model)
            opt = accelerator.prepare(optimizer_of(model, way))
        else:
            opt = optimizer_of(model, way)
            opt, outer = accelerator.prepare(opt, model)
        return accelerator, model, outer, opt

    def go(accelerator, outer, opt, found):
        for batch in found:
            with accelerator.accumulate(outer):
                accelerator.backward(outer(**batch)["loss"])
                if way in CLIPPED:
                    accelerator.clip_grad_norm_(outer.parameters(), CLIP)
                opt.step()
                opt.zero_grad()

    found = batches(way, rank, ranks)
    accelerator, model, outer, opt = begin(late=False)
    if way != "resume":
        go(accelerator, outer, opt, found)
        return model
    go(accelerator, outer, opt, found[: STEPS // 2])
    accelerator.save_state(f"{folder}/half")
    accelerator, model, outer, opt = begin(late=True)
    accelerator.load_state(f"{folder}/half")
    go(accelerator, outer, opt, found[STEPS // 2 :])
    return model


def transformers(way, rank, ranks, folder):
    from accelerate.state import AcceleratorState, GradientState
    from transformers import Trainer, TrainingArguments

    class Own(Trainer):
        def get_train_dataloader(self):
            return loader(batches(way, rank, ranks))

    def fit(steps, checkpoint=None):
        AcceleratorState._reset_state()
        GradientState._reset_state()
        arguments = TrainingArguments(
            output_dir=folder,
            use_cpu=True,
            ddp_backend="gloo" if ranks > 1 else None,
            max_steps=steps,
            per_device_train_batch_size=ROWS,
            gradient_accumulation_steps=PARTS if way == "accumulate" else 1,
            max_grad_norm=CLIP if way in CLIPPED else 0.0,
            bf16=way in BF16,
            torch_compile=way == "compile",
            lr_scheduler_type="constant",
            save_strategy="steps" if way == "resume" else "no",
            save_steps=STEPS // 2,
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
        )
        model = made()
        trainer = Own(
            model,
            arguments,
            train_dataset=Rows(batches(way, rank, ranks)),
            optimizer_cls_and_kwargs=(natgrad.SPNGD, {"model": model, **options_of(way)}),
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        return model

    if way != "resume":
        return fit(STEPS)
    fit(STEPS // 2)
    return fit(STEPS, f"{folder}/checkpoint-{STEPS // 2}")


def refused(told):
    """Whether a trainer says that it does not clip the gradients of an optimizer that unscales them itself."""
    return isinstance(told, str) and "does not allow for gradient clipping" in told


LOOPS = {"hand": by_hand, "lightning": lightning, "accelerate": accelerate, "transformers": transformers}


def worker(name, folder):
    """All ways of one loop on this rank; its final weights go into the folder."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if ranks == 1:
        for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            os.environ.pop(key, None)
    elif name == "hand":
        dist.init_process_group("gloo")
    for way in WAYS:
        gc.collect()  # an optimizer that still watches would have compiled models run eagerly
        torch._dynamo.reset()
        counters.clear()
        try:
            model = LOOPS[name](way, rank, ranks, f"{folder}/{name}-{way}-{ranks}")
            found = [p.detach().clone() for p in model.parameters()]
            if way == "compile" and not counters["stats"]["unique_graphs"]:
                found = "nothing was compiled"
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
            if ranks > 1 and not refused(found):
                torch.save(found, f"{folder}/{name}-{way}-{ranks}-{rank}.pt")
                raise
        torch.save(found, f"{folder}/{name}-{way}-{ranks}-{rank}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()


def memory(folder):
    """Bytes of state of rank 0 for a network of some size, and what a step sends, by who owns layers."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {}
    for name, owners in (("every rank keeps everything", None), ("layers divided", True)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
        opt = natgrad.SPNGD(model, lr=0.05, refresh=2, world=natgrad.World(owners=owners))
        outer, sent = nn.parallel.DistributedDataParallel(model), []
        for _ in range(4):
            x = torch.randn(32, 64)
            opt.zero_grad()
            F.cross_entropy(outer(x), torch.randint(0, 10, (32,))).backward()
            opt.step()
            sent.append(sum(opt.traffic().values()))
        held = sum(v.numel() * v.element_size() for state in opt.state.values() for v in state.values())
        found[name] = {
            "parameters": sum(p.numel() * p.element_size() for p in model.parameters()),
            "state of the largest rank": held,
            "sent in a measuring step": sent[-2],
            "sent in a plain step": sent[-1],
        }
        del outer, opt, model  # or the group is closed while they still hold it
    torch.save(found, f"{folder}/memory-{dist.get_rank()}.pt")
    os._exit(0)  # closing the group can wait for ever for a reducer that DistributedDataParallel has left


def launch(ranks, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command = command if ranks > 1 else [sys.executable]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.run(
        [*command, __file__, *arguments], env=environment, capture_output=True, text=True, check=False
    )


def compared(folder, name, way, ranks):
    """ "equal", by how much the weights differ, or the error."""
    here = [Path(folder, f"{loop}-{way}-{ranks}-{rank}.pt") for rank in range(ranks) for loop in (name, "hand")]
    if not all(path.exists() for path in here):
        return "did not end"
    ends = [torch.load(path) for path in here]
    for told in ends:
        if isinstance(told, str):
            return f"refused by {name.capitalize()}" if refused(told) else told
    if all(torch.equal(p, q) for other in ends[1:] for p, q in zip(ends[0], other)):
        return "equal"
    return f"off by {max(float((p - q).abs().max()) for other in ends[1:] for p, q in zip(ends[0], other)):.1e}"


def table(trainers, ranks=(1, 2)):
    """{trainer: {way: {ranks: what came of it}}}, and the memory."""
    found = {name: {way: {} for way in WAYS} for name in trainers}
    with tempfile.TemporaryDirectory() as folder:
        for count in ranks:
            for name in ("hand", *trainers):
                done = launch(count, "--worker", name, folder)
                if done.returncode:
                    print(done.stderr[-3000:], file=sys.stderr)
            for name in trainers:
                for way in WAYS:
                    found[name][way][str(count)] = compared(folder, name, way, count)
        kept = {}
        if 2 in ranks:
            launch(2, "--worker", "memory", folder)
            kept = [torch.load(f"{folder}/memory-{rank}.pt") for rank in range(2)]
            kept = {name: {key: max(own[name][key] for own in kept) for key in kept[0][name]} for name in kept[0]}
    return found, kept


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker", nargs=2)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    if chosen.worker:
        name, folder = chosen.worker
        return memory(folder) if name == "memory" else worker(name, folder)
    there = [name for name, package in TRAINERS.items() if util.find_spec(package)]
    found, kept = table(there)
    versions = {package: metadata.version(package) for package in ("torch", *map(TRAINERS.get, there))}
    where = {
        "machine": machine("cpu"),
        "python": platform.python_version(),
        "commit": git("rev-parse", "--short", "HEAD"),
    }
    result = {**where, "versions": versions, "steps": STEPS, "equal to the loop": found, "memory": kept}
    print(json.dumps(result, indent=1))
    if chosen.out:
        chosen.out.write_text(json.dumps(result, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
