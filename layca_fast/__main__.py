"""``python -m layca_fast info | verify | demo | plot``."""

import sys
from importlib import import_module

from .messages import aligned

#: Each command: the module of ``commands/`` that has its ``main``, and what it does.
COMMANDS = {
    "info": ("info", "show versions, devices, and each backend, with the reason why it cannot run"),
    "verify": ("verify", "check every backend on this machine against a float64 reference"),
    "demo": ("demo.main", "train a network on real digits with torch's optimizers and with FusedLayca"),
    "plot": ("plot", "draw the rotation curves that a run has written to a file"),
}


def main(argv: list[str]) -> int:
    """Run one command; returns its exit code."""
    asks = argv[:1] in (["-h"], ["--help"])
    if asks or not argv or argv[0] not in COMMANDS:
        lines = aligned(("command", "what it does"), [(name, about) for name, (_, about) in COMMANDS.items()])
        usage = f"usage: python -m layca_fast {{{','.join(COMMANDS)}}} [options]\n\n{lines}\n\n"
        usage += "python -m layca_fast COMMAND --help lists its options"
        print(usage, file=sys.stdout if asks else sys.stderr)
        return 0 if asks else 2
    code: int = import_module(f"layca_fast.commands.{COMMANDS[argv[0]][0]}").main(argv[1:])
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
