"""Train a character model on Python's own reference with FSDP2, and compare optimizers: one table of loss by step.

    python examples/train_lm.py --optimizer all                                       # one process: a GPU, or the CPU
    torchrun --standalone --nproc-per-node 8 examples/train_lm.py --optimizer all     # eight GPUs
    python examples/train_lm.py --optimizer all --width 32,64,128 --search            # the best rate of each, as a CSV

Parameters, gradients and state are sharded over all processes; weights are float32, computation bfloat16. ``--search``
tries powers of 2 as rates, from the one of the optimizer on, until the best by loss on held-out text has worse ones on
both sides. What the CSV has is not trained again, so a search goes on where it was interrupted.
"""

import argparse
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_data import Text, batch, python_reference
from lm_model import CharacterGPT, Head, loss_of
from lm_search import RESULTS, Search
from torch import Tensor, distributed, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.optim import Optimizer

from layca_fast import FusedLayca, layer_groups
from layca_fast.figures.console import print_table

#: Peak learning rates: what a layer turns by, in radians, under ours. With "muon" alone nothing turns: these are Muon's
#: own steps.
RATES = {
    "layca": 0.02,
    "hyperball": 0.02,
    "adamw": 0.02,
    "muon": 2**-5,
    "muon-layca": 2**-4,
    "muon-hyperball": 2**-4,
}

#: Of the tensors that neither rotate nor are Muon's: embeddings, norms, the head.
OTHERS_RATE = 0.02

#: Of what decays.
WEIGHT_DECAY = 0.1


def numbers(text: str) -> list[int]:
    """Of "32,64": [32, 64]."""
    return [int(number) for number in text.split(",")]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; ``optimizer`` as a list of names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizer", default="layca", help=f"any of {','.join(RATES)}, separated by commas, or all")
    parser.add_argument("--lr", type=float, help="peak rate, instead of the one for each optimizer")
    parser.add_argument("--rotate-embeddings", action="store_true", help="embeddings turn, too")
    parser.add_argument("--rotate-head", action="store_true", help="the head that makes logits turns, too")
    parser.add_argument("--in-backward", action="store_true", help="step inside of backward (not adamw)")
    parser.add_argument("--precision", choices=["bfloat16", "float32"], default="bfloat16", help="of the computation")
    parser.add_argument("--width", type=numbers, default=[64], help="or several, separated by commas (default: 64)")
    for name, value in {"heads": 4, "layers": 2, "context": 64, "batch": 16, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=value, help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--log-every", type=int, default=100, help="steps per row of the table")
    parser.add_argument("--checkpoint", type=Path, help="folder to save to, and to go on from if it has a checkpoint")
    parser.add_argument("--save-every", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--search", action="store_true", help="find the best rate of each optimizer at each width")
    parser.add_argument("--seeds", type=int, default=1, help="of a search: how many, from --seed on (default: 1)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the CSV of a search (default: in examples/results)")
    parsed = parser.parse_args(arguments)
    parsed.optimizer = list(RATES) if parsed.optimizer == "all" else parsed.optimizer.split(",")
    unknown = [name for name in parsed.optimizer if name not in RATES]
    if unknown:
        parser.error(f"--optimizer {','.join(unknown)}: choose from {', '.join(RATES)}, or all")
    if parsed.lr is not None and parsed.search:
        parser.error(f"--lr {parsed.lr}: a search tries rates of its own; leave it out")
    if parsed.checkpoint is not None and (parsed.search or len(parsed.width) > 1):
        parser.error(f"--checkpoint {parsed.checkpoint}: is for one width, and not for a search, whose CSV is enough")
    return parsed


def join_processes() -> torch.device:
    """The device of this process, which torchrun started with others; without torchrun it is alone."""
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    # Checkpoints exchange CPU tensors on GPU machines, too.
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    if "RANK" in os.environ:
        distributed.init_process_group(backend)
    else:
        distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
    return device


def make_model(options: argparse.Namespace, text: Text, device: torch.device) -> CharacterGPT:
    """The same weights on every process, of which each then keeps its part."""
    torch.manual_seed(options.seed)
    model = CharacterGPT(len(text.vocabulary), options.context, options.width, options.heads, options.layers).to(device)
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=getattr(torch, options.precision), reduce_dtype=torch.float32)
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
    return model


def make_optimizer(name: str, model: nn.Module, options: argparse.Namespace) -> Optimizer:
    """AdamW as language models use it; or Adam's or Muon's direction, along which every matrix turns by the rate."""
    rate, betas = options.lr or RATES[name], (0.9, 0.95)
    if name == "adamw":
        matrices = [param for param in model.parameters() if param.dim() >= 2]
        others = [param for param in model.parameters() if param.dim() < 2]
        groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, rate, betas)
    uses_muon, rule = name.startswith("muon"), name.removeprefix("muon-")
    turning = layer_groups(
        model,
        lr=rate,
        others_lr=OTHERS_RATE,
        embeddings=options.rotate_embeddings,
        rotate={Head: 1 if options.rotate_head else False},
        betas=betas,
        **({"base": "muon", "others_base": "adam"} if uses_muon else {"base": "adam"}),
    )
    if rule == "muon":
        rule = "layca"  # of what does not rotate, without a meaning
        for group in turning:
            if group["rotate"]:
                group.update(rotate=False, weight_decay=WEIGHT_DECAY)
    optimizer = FusedLayca(turning, rule=rule)
    if options.in_backward:
        optimizer.step_in_backward()
    return optimizer


def schedule(step: int, steps: int) -> float:
    """What the rates are multiplied by: up to 1 in the first twentieth of the run, then down half a cosine to 0."""
    warm_up = max(1, steps // 20)
    progress = max(0, step + 1 - warm_up) / max(1, steps - warm_up)
    return min((step + 1) / warm_up, (1 + math.cos(math.pi * progress)) / 2)


class Training:
    """One optimizer's run: its sharded model, and the ``history`` of (step, mean loss since the last)."""

    def __init__(self, name: str, options: argparse.Namespace, text: Text, device: torch.device) -> None:
        self.options, self.text, self.device = options, text, device
        self.rank, self.ranks = distributed.get_rank(), distributed.get_world_size()
        self.model = make_model(options, text, device)
        self.optimizer = make_optimizer(name, self.model, options)
        self.rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.folder = None if options.checkpoint is None else options.checkpoint / name
        self.history: list[tuple[int, float]] = []
        self.done, self.tokens_per_second = 0, 0.0

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "history": self.history, "done": self.done}

    def resume(self) -> None:
        """Go on from the last checkpoint that is complete, if there is one: its ``.metadata`` is written last."""
        saved = [] if self.folder is None else [path.parent for path in self.folder.glob("step-*/.metadata")]
        if not saved:
            return
        state = self.state()
        checkpoint.load(state, checkpoint_id=max(saved, key=lambda path: int(path.name.removeprefix("step-"))))
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        self.history, self.done = state["history"], state["done"]

    def loss(self, tokens: Tensor, seed: int) -> Tensor:
        """Of this process's part of a random batch, 0-d."""
        options = self.options
        inputs, targets = batch(tokens, options.batch, options.context, seed, self.rank, self.ranks)
        return loss_of(self.model(inputs.to(self.device)), targets.to(self.device))

    def mean(self, value: Tensor) -> float:
        """Over all processes."""
        distributed.all_reduce(value)
        return value.item() / self.ranks

    def step(self) -> Tensor:
        """Returns this process's loss before the step, 0-d."""
        factor = schedule(self.done, self.options.steps)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor
        self.optimizer.zero_grad()
        loss = self.loss(self.text.train, self.options.seed + 1 + self.done)
        loss.backward()
        self.optimizer.step()
        self.done += 1
        return loss.detach()

    def run(self) -> None:
        """Train to the end, from the last checkpoint if there is one."""
        options = self.options
        self.resume()
        first, start, losses = self.done, time.perf_counter(), []
        while self.done < options.steps:
            losses.append(self.step())
            if self.done % options.log_every == 0 or self.done == options.steps:
                self.history.append((self.done, self.mean(torch.stack(losses).mean())))
                losses = []
            if self.folder is not None and (self.done % options.save_every == 0 or self.done == options.steps):
                checkpoint.save(self.state(), checkpoint_id=self.folder / f"step-{self.done}")
        tokens = (self.done - first) * options.batch * options.context
        self.tokens_per_second = tokens / (time.perf_counter() - start)

    @torch.no_grad()
    def held_out_loss(self, batches: int = 8) -> float:
        losses = [self.loss(self.text.held_out, self.options.seed + number) for number in range(batches)]
        return self.mean(torch.stack(losses).mean())


def compare(options: argparse.Namespace, text: Text, device: torch.device) -> None:
    """Train with each optimizer in turn; the first process prints the table."""
    columns: list[list[str]] = []
    for name in options.optimizer:
        training = Training(name, options, text, device)
        training.run()
        losses = [f"{loss:.4f}" for _, loss in training.history]
        columns.append([*losses, f"{training.held_out_loss():.4f}", f"{training.tokens_per_second:,.0f}"])
        labels = [*(str(step) for step, _ in training.history), "held out", "tokens/s"]
    if distributed.get_rank() == 0:
        where = f"{distributed.get_world_size()} x {device.type}, {options.precision}"
        print(f"Trained on {len(text.train):,} characters of pydoc_data.topics, {where}; loss in nats per character.")
        rows = [list(row) for row in zip(labels, *columns, strict=True)]
        print_table(f"Loss by step, width {options.width}", ["step", *options.optimizer], rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Train what is asked for."""
    options, device, text = parse(arguments), join_processes(), python_reference()

    def of_width(width: int, **changes: Any) -> argparse.Namespace:
        return argparse.Namespace(**{**vars(options), "width": width, **changes})

    def held_out(name: str, width: int, lr: float, seed: int) -> float:
        training = Training(name, of_width(width, lr=lr, seed=seed), text, device)
        training.run()
        return training.held_out_loss()

    if options.search:
        Search(options, held_out).run(RATES)
    else:
        for width in options.width:
            compare(of_width(width), text, device)
    # Without it, processes that end first may take the others down.
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
