import json
import subprocess
import sys
from pathlib import Path

import pytest

from embodied_rl import apt, doctor, vulkan

pytestmark = pytest.mark.unit
ROOT = Path(__file__).resolve().parent.parent

DEB822 = """\
# a comment inside the file
Types: deb deb-src
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://mirror.example/debian-security
Suites: bookworm-security
Components: main
"""
ONE_LINE = """\
# deb http://old.example/debian bookworm main
deb-src http://mirror.example/debian bookworm main
deb [arch=amd64 signed-by=/etc/apt/keys/d.gpg] https://mirror.example/debian/ bookworm main
deb https://mirror.example/security bookworm-security main
"""


def test_backports_source_from_deb822():
    assert apt.backports_source(DEB822, "bookworm") == (
        "Types: deb\n"
        "URIs: http://mirror.example/debian\n"
        "Suites: bookworm-backports\n"
        "Components: main\n"
        "Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n"
    )


def test_backports_source_from_one_line_entries():
    assert apt.backports_source(ONE_LINE, "bookworm") == (
        "Types: deb\n"
        "URIs: https://mirror.example/debian/\n"
        "Suites: bookworm-backports\n"
        "Components: main\n"
        "Signed-By: /etc/apt/keys/d.gpg\n"
    )


def test_backports_source_keeps_an_inline_key():
    key = "Signed-By:\n -----BEGIN PGP PUBLIC KEY BLOCK-----\n .\n mDMEY\n"
    text = f"Types: deb\nURIs: http://m.example/debian\nSuites: bookworm\nComponents: main\n{key}"
    entry = apt.backports_source(text, "bookworm")
    assert entry.endswith(f"Components: main\n{key}")


def test_backports_source_is_empty_where_backports_are_configured():
    text = DEB822.replace("bookworm-updates", "bookworm-backports")
    assert apt.backports_source(text, "bookworm") == ""


@pytest.mark.parametrize("text", ["", DEB822.replace("Types: deb", "Enabled: no\nTypes: deb")])
def test_backports_source_names_the_suites_it_found(text):
    with pytest.raises(LookupError, match="no source for the suite 'bookworm', only for: none"):
        apt.backports_source(text, "bookworm")


def test_os_release_strips_quotes(tmp_path):
    path = tmp_path / "os-release"
    path.write_text('ID=debian\nVERSION_CODENAME="bookworm"\n')
    assert apt.os_release(str(path)) == {"ID": "debian", "VERSION_CODENAME": "bookworm"}
    assert apt.os_release(str(tmp_path / "none")) == {}


def test_doctor_imports_nothing_but_the_standard_library():
    command = [sys.executable, "-S", "-c", "import embodied_rl.doctor"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_hidden_driver_is_a_row_with_a_cure_and_exit_status_one():
    done = subprocess.run(
        [sys.executable, "-m", "embodied_rl.doctor", "--json"],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "VK_DRIVER_FILES": "/none.json"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    rows = {row["check"]: row for row in report["rows"]}
    assert report["ok"] is False
    assert rows["Vulkan render"]["status"] == "missing"
    assert "/none.json" in rows["Vulkan render"]["found"]
    assert rows["Vulkan render"]["cure"] == "unset VK_DRIVER_FILES"
    assert rows["torch"]["status"] != "missing"
    assert {row["status"] for row in rows.values()} <= {"ok", "warn", "missing"}


def test_override_is_not_mended_by_installing(monkeypatch):
    monkeypatch.setenv("VK_ICD_FILENAMES", "/none.json")
    monkeypatch.delenv("VK_DRIVER_FILES", raising=False)
    status = vulkan.check_render()
    assert not status.ok
    assert "VK_ICD_FILENAMES=/none.json" in status.detail
    assert status.cure == "unset VK_ICD_FILENAMES"


def test_driver_install_without_root_prints_the_commands(monkeypatch):
    monkeypatch.setattr(vulkan.os, "geteuid", lambda: 1000)
    monkeypatch.setattr(apt, "is_available", lambda: True)
    monkeypatch.setattr(apt, "os_release", lambda: {"VERSION_CODENAME": "bookworm"})
    monkeypatch.setattr(apt, "_configured", lambda: DEB822)
    status = vulkan.install_driver()
    assert not status.ok
    assert "sudo tee /etc/apt/sources.list.d/embodied-rl-backports.sources" in status.cure
    assert "sudo apt-get install -y" in status.cure
    assert "-t bookworm-backports mesa-vulkan-drivers" in status.cure


def test_missing_package_is_a_row_with_a_cure():
    row = doctor.package_row("no-such-package-anywhere")
    assert (row.status, row.found) == ("missing", "not installed")
    assert row.cure.startswith(sys.executable) and "no-such-package-anywhere" in row.cure
    assert doctor.package_row("no-such-package-anywhere", needed=False).status == "warn"


def test_broken_package_is_a_row_with_its_error():
    row = doctor.package_row("pytest", "raise ImportError('libGL.so.1: cannot open')")
    assert row.status == "missing"
    assert "ImportError: libGL.so.1" in row.found


def test_table_is_aligned_and_shortens_what_was_found(capsys, monkeypatch):
    rows = [doctor.Row("a", "ok", "1.0"), doctor.Row("longer name", "missing", "x" * 200, "mend")]
    monkeypatch.setattr(doctor, "examine", lambda: rows)
    assert doctor.main([]) == 1
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.index("status") == first.index("ok") == second.index("missing")
    assert head.index("cure") == second.index("mend")
    assert len(second) < 110
