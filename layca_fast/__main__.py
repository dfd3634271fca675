"""``python -m layca_fast info | verify | demo | plot``."""

import sys
from importlib import import_module

#: Each command, and the module of ``commands/`` that has its ``main``.
COMMANDS = {"info": "info", "verify": "verify", "demo": "demo.main", "plot": "plot"}


def main(argv: list[str]) -> int:
    """Run one command; returns its exit code."""
    asks = argv[:1] in (["-h"], ["--help"])
    if asks or not argv or argv[0] not in COMMANDS:
        usage = f"usage: python -m layca_fast {{{','.join(COMMANDS)}}} [options]"
        print(usage, file=sys.stdout if asks else sys.stderr)
        return 0 if asks else 2
    code: int = import_module(f"layca_fast.commands.{COMMANDS[argv[0]]}").main(argv[1:])
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
