"""Laws of parts: what a dead process left is removed by the next of its sort, and nothing else."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from unmask.errors import CheckpointError
from unmask.places import hold, lock_beside, part_of, remove_dead, temporary_folder

WRITE = (
    "import sys, time; from pathlib import Path; from unmask.places import part_of, temporary_folder\n"
    "with part_of(Path(sys.argv[1]), folder=sys.argv[2] == 'folder') as part, temporary_folder('unmask-test-') as t:\n"
    "    print(part, t, sep='\\n', flush=True)\n"
    "    time.sleep(60)\n"
)


def writer(final: Path, kind: str, among: Path) -> tuple[subprocess.Popen[str], list[Path]]:
    environment = {**os.environ, "TMPDIR": str(among)}
    process = subprocess.Popen(
        [sys.executable, "-c", WRITE, str(final), kind], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    return process, [Path(process.stdout.readline().strip()) for _ in range(2)]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_killed_process_left_goes_and_what_a_living_one_writes_stays(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    final, among = tmp_path / "out", tmp_path / "temporary"
    among.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(among))
    with writer(final, kind, among)[0] as killed:
        left = [*tmp_path.glob(".out.*.part"), *among.glob("unmask-test-*")]
        killed.send_signal(signal.SIGKILL)
    living, theirs = writer(final, kind, among)
    others = [tmp_path / ".other.1.part", tmp_path / ".out.x.part", tmp_path / ".out.part"]
    for path in others:
        path.touch()
    with living:
        assert len(left) == 2 and not any(path.exists() for path in left)  # the living one has removed them
        with part_of(final) as part, temporary_folder("unmask-test-") as folder:
            assert all(path.exists() for path in (*theirs, *others, part, folder))
            pass
        living.terminate()
    assert final.exists() and all(path.exists() for path in others)


def test_a_part_that_another_machine_has_locked_stays(tmp_path: Path) -> None:
    part = tmp_path / ".out.999999999.part"  # no process of this machine
    part.mkdir()
    handle = os.open(part, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    pattern = re.compile(r"\.out\.(\d+)\.part")
    remove_dead(tmp_path, pattern)
    assert part.exists()
    os.close(handle)
    remove_dead(tmp_path, pattern)
    assert not part.exists()


def test_a_process_with_the_number_of_the_dead_one_takes_its_place(tmp_path: Path) -> None:
    (tmp_path / f".out.{os.getpid()}.part").mkdir()  # as in containers, where each process is number 1
    with part_of(tmp_path / "out", folder=True) as part:
        (part / "file").touch()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]


def test_a_link_is_no_part(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / ".out.999999999.part").symlink_to(tmp_path / "precious")
    with part_of(tmp_path / "out"):
        pass
    assert (tmp_path / "precious").is_dir()


def test_what_replaces_a_file_keeps_its_permissions_and_the_links_to_it(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    final, link = tmp_path / "other" / "out", tmp_path / "link"
    final.write_text("old")
    final.chmod(0o640)
    link.symlink_to(final)
    with part_of(link) as part:
        assert part.parent == final.parent and final.read_text() == "old"  # on the file system that it ends on
        part.write_text("new")
    assert link.is_symlink() and final.read_text() == "new" and final.stat().st_mode & 0o777 == 0o640
    assert list(final.parent.iterdir()) == [final]


@pytest.mark.parametrize("umask", [0o077, 0o002])
def test_what_is_new_follows_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with part_of(tmp_path / "file"), part_of(tmp_path / "folder", folder=True):
            pass
    finally:
        os.umask(before)
    modes = [(tmp_path / name).stat().st_mode & 0o777 for name in ("file", "folder")]
    assert modes == [0o666 & ~umask, 0o777 & ~umask]


def test_a_mount_point_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.path.ismount", lambda _: True)
    with pytest.raises(OSError, match="a mount point") as caught, part_of(tmp_path / "out", folder=True):
        pytest.fail("begun")
    assert caught.value.filename == str(tmp_path / "out") and list(tmp_path.iterdir()) == []


def test_the_current_folder_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match="the current folder"), part_of(Path("."), folder=True):
        pytest.fail("begun")


def test_a_full_disk_is_reported_with_the_file(tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught, part_of(tmp_path / "out"), open("/dev/full", "w") as full:
        full.write("x")
        full.flush()
    assert caught.value.filename == str(tmp_path / "out") and list(tmp_path.iterdir()) == []


def test_a_part_that_is_not_finished_is_removed(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), part_of(tmp_path / "out", folder=True) as part:
        (part / "file").touch()
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_place_is_held_by_one(tmp_path: Path) -> None:
    with hold(tmp_path / ".lock", "--output", tmp_path, "works in"):
        with pytest.raises(CheckpointError) as caught, hold(tmp_path / ".lock", "--output", tmp_path, "works in"):
            pass
        assert f"--output: another process (pid {os.getpid()}) works in {tmp_path}; wait for it" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", [".", "..", "/", "link"])
def test_every_place_has_a_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    Path("link").symlink_to(tmp_path / "out")
    expected = {".": "a/.b.lock", "..": ".a.lock", "/": "/..lock", "link": ".out.lock"}[place]
    assert lock_beside(Path(place)) == tmp_path / expected


def test_a_lock_file_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "thesis").write_text("ten years of work")
    (tmp_path / ".lock").symlink_to(tmp_path / "thesis")
    with pytest.raises(CheckpointError, match="cannot be locked"), hold(tmp_path / ".lock", "--output", tmp_path, "x"):
        pass
    assert (tmp_path / "thesis").read_text() == "ten years of work"
