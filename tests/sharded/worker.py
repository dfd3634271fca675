"""Runs cases of sharded training on real processes: ``python -m tests.sharded.worker FOLDER SEED SET``.

For each world size in turn it forks that many processes, which run every case of that size; so torch is imported once,
with the parts of it that it would import at the first step of each process.
What a case raised, if anything, is in FOLDER/outcomes.json, by world size, case and rank. Cases of later world sizes
find in FOLDER what earlier ones left.
"""

import datetime
import json
import multiprocessing
import sys
import traceback
import warnings
from pathlib import Path

import torch
import torch._dynamo
import torch.distributed as dist
import torch.onnx

from layca_fast.backends import load

from ..support import BACKENDS, HANGS
from . import (  # noqa: F401  (they add their cases)
    attached,
    changes,
    checkpoints,
    directions,
    exchanges,
    in_backward,
    killed,
    layers,
    monitors,
    parts,
    radii,
    training,
)
from .support import Place, cases_of, start

#: Checkpoints are written by two processes, and read by other numbers.
WORLDS = (2, 1, 3, 4, 6)


def run(rank: int, world: int, folder: Path, seed: int, chosen: str) -> None:
    warnings.simplefilter("error")
    # torch.distributed warns of its own calls.
    warnings.filterwarnings("ignore", module=r"torch\.")
    start(rank, world, folder / f"meeting-{world}")
    outcomes = {}
    for name, case in cases_of(chosen, world).items():
        torch.manual_seed(seed)
        try:
            case(Place(rank, world, folder, seed))
            dist.monitored_barrier(timeout=datetime.timedelta(seconds=HANGS))
        except Exception:
            # The others may wait for this process in vain: its end is an error to them, which beats any limit of time.
            outcomes[name] = traceback.format_exc()
            break
        outcomes[name] = ""
    (folder / f"{world}-{rank}.json").write_text(json.dumps(outcomes), encoding="utf-8")
    if not any(outcomes.values()):
        dist.destroy_process_group()


def main() -> None:
    folder, seed, chosen = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    for name in BACKENDS:
        load(name).missing()
    fork = multiprocessing.get_context("fork")
    for world in WORLDS:
        processes = [fork.Process(target=run, args=(rank, world, folder, seed, chosen)) for rank in range(world)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    if chosen == "default":
        (folder / "killed").mkdir()
        killed.run(folder / "killed", seed)


if __name__ == "__main__":
    main()
