"""Finds out whether SAPIEN, ManiSkill's simulator, can render, and installs a Vulkan driver.

ManiSkill needs a Vulkan driver even for state observations without rendering. Without a GPU that
is Mesa's software driver, 24.3 or newer. Nothing but the standard library is imported here.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from embodied_rl import apt

OVERRIDES = ("VK_DRIVER_FILES", "VK_ICD_FILENAMES")
ICD_FOLDERS = ("/usr/share/vulkan/icd.d", "/etc/vulkan/icd.d", "/usr/local/share/vulkan/icd.d")
# Where container runtimes and other distributions put the NVIDIA driver's entry.
ICD_ELSEWHERE = (
    "/usr/local/nvidia",
    "/usr/share/nvidia",
    "/opt/nvidia",
    "/run/opengl-driver/share",
)
INSTALL = "-m embodied_rl.vulkan"
OTHER_DISTROS = {
    "dnf": "dnf install mesa-vulkan-drivers vulkan-loader libglvnd-glx libglvnd-egl libX11 glib2",
    "pacman": "pacman -S vulkan-swrast vulkan-icd-loader libglvnd libx11 glib2",
    "zypper": "zypper install libvulkan_lvp libvulkan1 libX11-6 Mesa-libGL1 Mesa-libEGL1",
}
# What ManiSkill does in `_setup_scene`: the CUDA device when there is one, else the CPU.
PROBE = """
import sapien
failures = []
for backend in ("cuda", "cpu"):
    try:
        device = sapien.Device(backend)
        sapien.render.RenderSystem(device)
    except RuntimeError as error:
        failures.append(str(error))
        continue
    summary = sapien.render.get_device_summary().strip() or "a Vulkan device"
    print("RENDER", backend, summary.splitlines()[0].replace("GPU: ", ""), sep="\\t")
    break
else:
    raise SystemExit(failures[-1])
"""


@dataclass(frozen=True)
class RenderStatus:
    """Whether SAPIEN can create its render system.

    Attributes:
        ok: it can.
        detail: the device that renders, or why there is none; one line.
        cure: the command or change that mends it; empty when there is nothing to mend.
        backend: ManiSkill's `render_backend` that works, "gpu" or "cpu"; empty when none does.
    """

    ok: bool
    detail: str
    cure: str = ""
    backend: str = ""


def run_python(code: str, timeout: float = 120.0, **variables: str) -> tuple[bool, str]:
    """Runs `code` in a fresh interpreter, which may crash without harm to this one.

    Args:
        code: the program.
        timeout: seconds it may take.
        **variables: environment variables to set for it.

    Returns:
        Success and standard output, or failure and the last line the interpreter had to say.
    """
    command, environment = [sys.executable, "-c", code], {**os.environ, **variables}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, env=environment
        )
    except subprocess.TimeoutExpired:
        return False, f"no answer within {timeout:g} s"
    except OSError as error:
        return False, str(error)
    if done.returncode == 0:
        return True, done.stdout.strip()
    lines = done.stderr.strip().splitlines()
    return False, lines[-1] if lines else f"the interpreter ended with status {done.returncode}"


def check_render() -> RenderStatus:
    """Creates SAPIEN's render system in a subprocess, as ManiSkill would; about a second."""
    works, said = run_python(PROBE)
    found = [line.split("\t") for line in said.splitlines() if line.startswith("RENDER\t")]
    if works and found:
        _, backend, device = found[0]
        return RenderStatus(True, device, "", "gpu" if backend == "cuda" else "cpu")
    if "No module named" in said:
        return RenderStatus(False, said, f"{shlex.quote(sys.executable)} -m pip install sapien")
    for name in OVERRIDES:
        if os.environ.get(name):
            return RenderStatus(False, _override_detail(name, said), f"unset {name}")
    if shutil.which("nvidia-smi"):
        return RenderStatus(False, said, _nvidia_cure())
    mesa = apt.package_version("mesa-vulkan-drivers")
    driver = f"Mesa {mesa}; needed is 24.3 or newer" if mesa else "no Mesa Vulkan driver"
    return RenderStatus(False, f"{said} ({driver})", install_cure())


def install_cure() -> str:
    """The one command that installs the driver, as this user can run it."""
    sudo = "" if os.geteuid() == 0 else "sudo "
    return f"{sudo}{shlex.quote(sys.executable)} {INSTALL}"


def install_driver() -> RenderStatus:
    """Installs Mesa's Vulkan driver and the libraries SAPIEN and OpenCV load, then checks again.

    Needs root on Debian or Ubuntu. Elsewhere nothing is touched, and the cure of the status
    returned is the list of commands to run, one a line.
    """
    if not apt.is_available():
        managers = [name for name in OTHER_DISTROS if shutil.which(name)]
        command = (
            f"sudo {OTHER_DISTROS[managers[0]]}"
            if managers
            else (
                "install Mesa 24.3 or newer with its lavapipe Vulkan driver, libvulkan, libX11, "
                "libGL, libEGL and glib with your system's package manager"
            )
        )
        return RenderStatus(False, "drivers are installed here on Debian and Ubuntu only", command)
    if os.geteuid() != 0:
        return RenderStatus(False, "installing a driver needs root", apt.manual_commands())
    failure = apt.install()
    status = check_render()
    if status.ok or not failure:
        return status
    return RenderStatus(False, failure, apt.manual_commands())


def _override_detail(name: str, said: str) -> str:
    missing = [path for path in os.environ[name].split(os.pathsep) if not Path(path).exists()]
    reason = f"no such file: {', '.join(missing)}" if missing else said
    return f"{name}={os.environ[name]} hides the installed drivers ({reason})"


def _nvidia_cure() -> str:
    """What makes an NVIDIA machine render: a driver entry that was tried and works, or advice.

    SAPIEN itself points the Vulkan loader at NVIDIA's driver alone when `nvidia-smi` runs, so
    Mesa's driver has to be named there even when it is installed.
    """
    folders = [(folder, "nvidia_icd*.json") for folder in (*ICD_FOLDERS, *ICD_ELSEWHERE)]
    for folder, pattern in [*folders, *((folder, "lvp_icd*.json") for folder in ICD_FOLDERS)]:
        for path in sorted(Path(folder).rglob(pattern)):
            if run_python(PROBE, VK_DRIVER_FILES=str(path))[0]:
                return f"export VK_DRIVER_FILES={path}"
    return (
        "start the container with NVIDIA_DRIVER_CAPABILITIES=all or install the GL part of the "
        f"NVIDIA driver; to render on the CPU instead: {install_cure()}"
    )


def main() -> int:
    """Installs the driver where it is missing; returns the exit code."""
    status = check_render()
    if INSTALL in status.cure:
        status = install_driver()
    print(f"Vulkan render: {'ok' if status.ok else 'missing'}: {status.detail}")
    if status.cure:
        print(f"To mend it:\n{status.cure}")
    return 0 if status.ok else 1


if __name__ == "__main__":
    sys.exit(main())
