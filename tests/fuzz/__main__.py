"""``python -m tests.fuzz``: random models, options and events between steps; cpu against torch against the reference.

Ends with 0 where every step agreed. A disagreement is printed with what led to it and the command that repeats it.
"""

import argparse
import random
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Collection, Sequence

from layca_fast.formulas.bases import FORMULAS

from .trial import Trial


def run_trial(
    seed: int,
    number: int,
    formulas: Collection[str] = FORMULAS,
    verbose: bool = False,
    tally: Counter[str] | None = None,
) -> tuple[int, str | None]:
    """How many steps were taken, and what went wrong, or None. ``tally`` counts: see ``Expected``."""
    steps = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trial = Trial(seed, number, formulas)
    if tally is not None:
        trial.tally = tally
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in trial.run():
                steps += 1
    except Exception as error:
        lines = trial.log if verbose else trial.log[-6:]
        report = "".join(traceback.format_exception(error)) if verbose else f"{type(error).__name__}: {error}"
        return steps, "\n".join([f"trial {number}, step {steps}: {report}", *(f"    {line}" for line in lines)])
    return steps, None


def _counts(tally: Counter[str]) -> str:
    return f"    tensors after steps: {', '.join(f'{count} {name}' for name, count in tally.most_common())}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run trials until so many steps are taken; 1 if any disagreed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--steps", type=int, default=20_000, help="stop after so many (default 20000)")
    parser.add_argument("--seed", type=int, help="of all that is random (default: a new one, printed)")
    parser.add_argument("--trial", type=int, help="only the trial of this number, with all that led to its end")
    parser.add_argument("--formulas", nargs="+", metavar="NAME", choices=FORMULAS, help=f"of {list(FORMULAS)}")
    parser.add_argument("--failures", type=int, default=10, help="stop after so many trials that failed (default 10)")
    args = parser.parse_args(argv)
    seed = random.SystemRandom().randrange(2**31) if args.seed is None else args.seed
    print(f"==> Fuzzing with --seed {seed}", flush=True)
    chosen = f" --formulas {' '.join(args.formulas)}" if args.formulas else ""
    start, steps, number, failed = time.monotonic(), 0, args.trial or 0, 0
    told, tally = start, Counter[str]()
    while steps < args.steps and failed < args.failures:
        taken, complaint = run_trial(seed, number, args.formulas or FORMULAS, args.trial is not None, tally)
        steps += taken
        if complaint is not None:
            failed += 1
            print(f"{complaint}\n    again: python -m tests.fuzz --seed {seed} --trial {number}{chosen}", flush=True)
        number += 1
        if args.trial is not None:
            break
        if time.monotonic() > told + 60:
            told = time.monotonic()
            print(f"{steps} steps in {number} trials, {failed} failed, after {told - start:.0f} s", flush=True)
            print(_counts(tally), flush=True)
    print(f"{steps} steps in {number - (args.trial or 0)} trials: {failed or 'none'} failed (--seed {seed})")
    print(_counts(tally))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
