"""Installs the Vulkan driver from the Debian or Ubuntu mirror this machine is configured for."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

PACKAGES = (
    "mesa-vulkan-drivers",
    "libvulkan1",
    "libx11-6",  # SAPIEN's renderer links it
    "libgl1",  # OpenCV, which ManiSkill imports, links it and glib
    "libegl1",
    "libglib2.0-0",
)
BACKPORTS_FILE = Path("/etc/apt/sources.list.d/embodied-rl-backports.sources")
# Releases whose own Mesa is too old and whose backports suite has a newer one.
OLD_RELEASES = ("bookworm",)


@dataclass(frozen=True)
class Source:
    """One entry of apt's configuration; `options` are its other fields, such as Signed-By."""

    uri: str
    suites: tuple[str, ...]
    options: dict[str, str]


def is_available() -> bool:
    """Whether this is a Debian or Ubuntu machine, or kin to them."""
    release = os_release()
    kin = {release.get("ID", ""), *release.get("ID_LIKE", "").split()}
    return shutil.which("apt-get") is not None and bool(kin & {"debian", "ubuntu"})


def os_release(path: str = "/etc/os-release") -> dict[str, str]:
    """The fields of os-release, empty where there is none."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.split("=", 1) for line in lines if "=" in line)
    return {key: value.strip().strip("\"'") for key, value in pairs}


def package_version(name: str) -> str:
    """The installed version of a Debian package, empty where it is not installed."""
    if not shutil.which("dpkg-query"):
        return ""
    command = ["dpkg-query", "-W", "-f", "${db:Status-Status} ${Version}", name]
    status, _, version = subprocess.run(command, capture_output=True, text=True).stdout.partition(
        " "
    )
    return version if status == "installed" else ""


def parse_sources(text: str) -> list[Source]:
    """Reads apt sources in either format: deb822 stanzas or lines that begin with `deb`."""
    found = []
    for line in text.splitlines():
        match = re.match(r"deb\s+(?:\[(.*?)\]\s+)?(\S+)\s+(\S+)", line.strip())
        if match:
            pairs = (pair.split("=", 1) for pair in (match[1] or "").split() if "=" in pair)
            options = {key.title(): value for key, value in pairs}
            found.append(Source(match[2], (match[3],), options))
    for stanza in re.split(r"\n\s*\n", re.sub(r"(?m)^#.*\n?", "", text)):
        # A field runs on over the lines that begin with a space: an inline key, a list of URIs.
        pairs = re.findall(r"(?m)^([\w-]+):[ \t]*(.*(?:\n[ \t].*)*)", stanza)
        fields = {key.title(): value.rstrip() for key, value in pairs}
        on = fields.get("Enabled", "yes").lower() != "no"
        if on and "deb" in fields.get("Types", "").split() and fields.get("Uris"):
            suites = tuple(fields.get("Suites", "").split())
            found.append(Source(fields["Uris"].split()[0], suites, fields))
    return found


def backports_source(text: str, codename: str) -> str:
    """The deb822 entry that adds the backports suite, derived from the machine's own entries.

    Args:
        text: all of apt's source files.
        codename: the release, such as "bookworm".

    Returns:
        The entry, with the URI and the key of the release's main entry; empty when backports
        are configured already.

    Raises:
        LookupError: no entry serves the release's own suite.
    """
    sources = parse_sources(text)
    if any(f"{codename}-backports" in source.suites for source in sources):
        return ""
    for source in sources:
        if codename in source.suites:
            kept = ("Signed-By", "Trusted")
            extra = [f"{key}: {source.options[key]}" for key in kept if key in source.options]
            lines = [
                "Types: deb",
                f"URIs: {source.uri}",
                f"Suites: {codename}-backports",
                "Components: main",
                *extra,
            ]
            return "\n".join(lines).replace(": \n", ":\n") + "\n"
    suites = sorted({suite for source in sources for suite in source.suites})
    raise LookupError(
        f"apt has no source for the suite {codename!r}, only for: {', '.join(suites) or 'none'}. "
        "Add one under /etc/apt/sources.list.d and run this again"
    )


def _plan() -> tuple[str, list[list[str]]]:
    """The source entry to add, maybe empty, and the commands to run."""
    codename = os_release().get("VERSION_CODENAME", "")
    target, entry = [], ""
    if codename in OLD_RELEASES:
        entry = backports_source(_configured(), codename)
        target = ["-t", f"{codename}-backports"]
    install = ["apt-get", "install", "-y", "--no-install-recommends", *target, *PACKAGES]
    return entry, [["apt-get", "update"], install]


def _configured() -> str:
    parts = Path("/etc/apt/sources.list.d")
    files = [Path("/etc/apt/sources.list"), *parts.glob("*.list"), *parts.glob("*.sources")]
    return "\n\n".join(path.read_text() for path in sorted(files) if path.is_file())


def manual_commands() -> str:
    """The commands that `install` runs, for the user to run with sudo, one a line."""
    try:
        entry, commands = _plan()
    except (LookupError, OSError) as error:
        return str(error)
    lines = [f"sudo tee {BACKPORTS_FILE} <<'END'\n{entry}END"] if entry else []
    return "\n".join(lines + [f"sudo {shlex.join(command)}" for command in commands])


def install() -> str:
    """Adds the backports source if needed and installs the packages, as root.

    Returns:
        What failed, in one line; empty on success.
    """
    try:
        entry, (update, packages) = _plan()
        if entry:
            print(f"+ write {BACKPORTS_FILE}", file=sys.stderr, flush=True)
            BACKPORTS_FILE.write_text(entry)
    except (LookupError, OSError) as error:
        return str(error)
    _run(update)  # a third-party source that is down is no reason to stop
    if _run(packages) == 0:
        return ""
    if entry:
        BACKPORTS_FILE.unlink(missing_ok=True)
    return f"`{shlex.join(packages)}` failed; its messages are above"


def _run(command: list[str]) -> int:
    print("+", shlex.join(command), file=sys.stderr, flush=True)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    return subprocess.run(command, env=environment, stdout=sys.stderr).returncode
