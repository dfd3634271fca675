"""Train the demo's network with torch's own Adam, watch how far its layers turn, and draw it (half a minute).

``python examples/watch_rotation.py --out docs/rotation.png`` made a figure of docs/monitoring.md.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from layca_fast import RotationMonitor
from layca_fast.commands.demo.training import BATCH, Network, load_digits, one_cpu_thread
from layca_fast.monitor.writers import JsonLinesWriter


def main(argv: Sequence[str] | None = None) -> None:
    """Train, print where each layer has ended, and write the files that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=40, help="of 20 steps each (default 40)")
    parser.add_argument("--lr", type=float, default=3**-4, help="of Adam (default 1/81, its best in the demo)")
    parser.add_argument("--out", type=Path, default=Path("rotation.png"), help="the figure (default rotation.png)")
    parser.add_argument("--log", type=Path, help="JSON lines, which python -m layca_fast plot draws, too")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    digits, network = load_digits(), Network()
    optimizer = torch.optim.Adam(network.parameters(), args.lr)
    monitor = RotationMonitor(network, every=4, per_step=True)
    with one_cpu_thread(), monitor.attach(optimizer):
        for _ in range(args.epochs):
            for batch in torch.randperm(len(digits.train_images)).split(BATCH):
                optimizer.zero_grad()
                cross_entropy(network(digits.train_images[batch]), digits.train_labels[batch]).backward()
                optimizer.step()

    curves = monitor.curves
    for name, rotation in zip(curves.names, curves.rotation[-1].tolist(), strict=True):
        print(f"{name:24} 1 - cos = {rotation:.3f}")
    curves.plot(args.out, title=f"torch.optim.Adam, lr {args.lr:.4f}")
    if args.log is not None:
        JsonLinesWriter(args.log).write(monitor)


if __name__ == "__main__":
    main()
