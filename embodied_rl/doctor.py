"""Tells what a run needs, what is here, and how to mend the rest: `python -m embodied_rl.doctor`.

Only the standard library is imported: torch, SAPIEN and the rest are probed in subprocesses, so
a missing or broken package is a row of the table and never a traceback.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from embodied_rl import apt, vulkan
from embodied_rl.cores import usable_cores

OK, WARN, MISSING = "ok", "warn", "missing"
CONSTRAINTS = Path(__file__).resolve().parent.parent / "constraints.txt"
PIP = f"{shlex.quote(sys.executable)} -m pip"
GIB = 2**30
WIDTH = 72
TORCH_PROBE = """
import torch
gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
print(torch.__version__, ", ".join(gpus), torch.get_num_threads(), sep="\\t")
"""
FFMPEG_PROBE = "import imageio_ffmpeg; print(imageio_ffmpeg.get_ffmpeg_exe())"


@dataclass(frozen=True)
class Row:
    """One line of the table; `status` is "ok", "warn" (a run works without) or "missing"."""

    check: str
    status: str
    found: str
    cure: str = ""


def version_of(package: str) -> str:
    """The installed version of a Python package, empty where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def pip_install(package: str) -> list[str]:
    """The command that installs `package` at the version this project is known to work with."""
    command = [sys.executable, "-m", "pip", "install"]
    if package == "mani_skill" and sys.version_info >= (3, 13):
        command.append("--no-deps")  # its mplib has no wheel there, and only its examples use it
    constraints = ["-c", str(CONSTRAINTS)] if CONSTRAINTS.is_file() else []
    return [*command, package, *constraints]


def package_row(package: str, probe: str = "", needed: bool = True) -> Row:
    """A row for a Python package: its version, or what importing it failed with.

    Args:
        package: the name pip knows.
        probe: a program that fails where the package is broken; empty to look no further.
        needed: whether a run needs it.
    """
    version = version_of(package)
    if not version:
        cure = shlex.join(pip_install(package))
        return Row(package, MISSING if needed else WARN, "not installed", cure)
    works, said = vulkan.run_python(probe) if probe else (True, "")
    if works:
        return Row(package, OK, version)
    cure = shlex.join([*pip_install(package), "--force-reinstall"])
    if "cannot open shared object file" in said:
        cure = vulkan.install_cure()  # a system library that the driver's install brings along
    return Row(package, MISSING if needed else WARN, f"{version}, but {said}", cure)


def python_row() -> Row:
    """The interpreter: 3.10 is the oldest that runs this project."""
    found = f"{platform.python_version()} at {sys.executable}"
    if sys.version_info >= (3, 10):  # noqa: UP036 - the doctor may meet an older one
        return Row("Python", OK, found)
    return Row("Python", MISSING, found, "make clean && PYTHON=python3.12 make setup")


def torch_rows() -> list[Row]:
    """Rows for torch, its CPU threads, the GPU and torchvision, which share one import."""
    works, said = vulkan.run_python(TORCH_PROBE)
    version, gpus, threads = (said.split("\t") + ["", ""])[:3] if works else ("", "", "")
    row = package_row("torch", "import torch" if not works else "")
    driver = nvidia_driver()
    if works:
        row = Row("torch", OK, f"{version}, CUDA devices: {gpus or 'none'}")
        if driver and not gpus:
            cure = f"{PIP} install --force-reinstall torch  # a CUDA build for this driver"
            row = Row("torch", WARN, f"{version}, which does not see the GPU", cure)
    rows = [row, Row("GPU", OK, driver or "none, the CPU is used")]
    if version_of("torchvision"):
        broken = not vulkan.run_python("import torch, torchvision")[0]
        found = version_of("torchvision")
        rows.append(
            Row(
                "torchvision",
                WARN if broken and works else OK,
                f"{found}, does not load beside this torch" if broken else found,
                f"{PIP} uninstall torchvision  # it breaks transformers" if broken else "",
            )
        )
    else:
        rows.append(Row("torchvision", OK, "not installed, not needed"))
    found = f"{usable_cores()} cores usable, torch threads: {threads or 'unknown'}"
    rows.append(Row("CPU", OK, found))
    return rows


def nvidia_driver() -> str:
    """What `nvidia-smi` reports, one GPU after another, empty where there is none."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return "; ".join(done.stdout.strip().splitlines()) if done.returncode == 0 else ""


def render_rows() -> list[Row]:
    """Rows for SAPIEN's renderer and for the Mesa driver behind it."""
    status = vulkan.check_render()
    mesa = apt.package_version("mesa-vulkan-drivers") or "no mesa-vulkan-drivers package"
    need = "" if status.ok else "; without a GPU SAPIEN needs 24.3 or newer"
    return [
        Row("Vulkan render", OK if status.ok else MISSING, status.detail, status.cure),
        Row("Mesa", OK if status.ok else WARN, mesa + need),
    ]


def space_row(check: str, folder: str, gib: float, cure: str) -> Row:
    """A row for the free space of a folder, a warning below `gib` GiB."""
    try:
        free = shutil.disk_usage(folder).free / GIB
    except OSError as error:
        return Row(check, WARN, str(error), cure)
    found = f"{free:.1f} GiB free in {os.path.abspath(folder)}"
    return Row(check, OK, found) if free >= gib else Row(check, WARN, found, cure)


def optional_rows() -> list[Row]:
    """Rows for what some runs use: video, several processes, compiled kernels."""
    works, said = vulkan.run_python(FFMPEG_PROBE)
    cure = "" if works else shlex.join(pip_install("imageio-ffmpeg"))
    rows = [Row("ffmpeg", OK if works else MISSING, said, cure), package_row("accelerate")]
    deepspeed = package_row("deepspeed", needed=False)
    if deepspeed.status == WARN and deepspeed.found == "not installed":
        cure = f"{PIP} install deepspeed"
        deepspeed = Row("deepspeed", OK, "not installed (optional)", cure)
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), "")
    found = compiler or "none (optional: torch.compile, DeepSpeed)"
    return [*rows, deepspeed, Row("C++ compiler", OK if compiler else WARN, found)]


def package_rows() -> list[Row]:
    """Rows for the simulator and what it stands on."""
    return [
        package_row("numpy", "import numpy"),
        package_row("gymnasium", "import gymnasium"),
        package_row("sapien"),
        package_row("mani_skill", "import mani_skill.envs"),
    ]


def space_rows() -> list[Row]:
    """Rows for the disk that takes replay and checkpoints and for what worker processes share."""
    return [
        space_row("disk", ".", 5.0, "free some space: replay and checkpoints go here"),
        space_row("shared memory", "/dev/shm", 0.25, "docker run --shm-size=2g"),
    ]


def examine() -> list[Row]:
    """All rows, in the order of the table; the probes are processes, so threads overlap them."""
    groups = (torch_rows, package_rows, render_rows, optional_rows, space_rows)
    with ThreadPoolExecutor(max_workers=2) as pool:
        found = pool.map(lambda group: group(), groups)
        return [python_row(), *(row for rows in found for row in rows)]


def table(rows: list[Row]) -> str:
    """The rows as aligned text."""
    lines = [("check", "status", "found", "cure")]
    for row in rows:
        found = row.found if len(row.found) <= WIDTH else row.found[: WIDTH - 3] + "..."
        lines.append((row.check, row.status, found, row.cure))
    a, b, c = (max(len(line[column]) for line in lines) for column in range(3))
    return "\n".join(f"{w:{a}}  {x:{b}}  {y:{c}}  {z}".rstrip() for w, x, y, z in lines)


def fix(rows: list[Row]) -> list[Row]:
    """Installs missing packages and the Vulkan driver; returns the rows as they are then."""
    absent = [row.check for row in rows if row.status == MISSING and row.found == "not installed"]
    for package in absent:
        command = pip_install(package)
        print("+", shlex.join(command), file=sys.stderr, flush=True)
        subprocess.run(command, stdout=sys.stderr)
    if absent:
        rows = examine()
    if not any(row.status == MISSING and vulkan.INSTALL in row.cure for row in rows):
        return rows
    status = vulkan.install_driver()
    if not status.ok:
        print(f"{status.detail}. To mend it:\n{status.cure}\n", file=sys.stderr, flush=True)
    return examine()


def is_ready(rows: list[Row]) -> bool:
    """Whether everything a run needs is here."""
    return all(row.status != MISSING for row in rows)


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; returns 0 where everything a run needs is here, else 1."""
    parser = argparse.ArgumentParser("python -m embodied_rl.doctor", description=__doc__)
    parser.add_argument("--fix", action="store_true", help="apply the cures, then look again")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    options = parser.parse_args(arguments)
    rows = examine()
    if options.fix and not is_ready(rows):
        rows = fix(rows)
    ready = is_ready(rows)
    if options.json:
        print(json.dumps({"ok": ready, "rows": [asdict(row) for row in rows]}, indent=2))
    else:
        print(table(rows))
    return 0 if ready else 1


if __name__ == "__main__":
    sys.exit(main())
