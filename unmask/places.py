"""Checks the paths that users give, locks files and folders, and writes files beside their place before renaming them.

An unfinished file or folder, a part, has the number of its process in its name and is locked by that process. The lock
ends with the process, however that dies; so the next command that writes there knows which parts are abandoned, and
removes them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from unmask.errors import CheckpointError, ConfigError

LOCK = ".lock"  # in a folder that one process at a time works in
_LEFT_TO_OPENING = (errno.ENOENT, errno.ENOTDIR, errno.EACCES)  # errors that are reported by what opens the path


def user_path(name: str | os.PathLike[str], where: str) -> Path:
    """Return a path that a user gave, `~` expanded, after checks that hold whether it exists or not.

    Args:
        name: as the user wrote it.
        where: the flag or field that it was given by, for messages.

    Raises:
        ConfigError: a name that no file can have, `~` of an unknown user, a link to what is not there, a pipe or a
            device.
    """
    text = os.fspath(name)
    if not text:
        raise ConfigError(f"{where}: the path is empty; name a file or folder")
    try:
        os.fsencode(text)  # refuses half characters but those that stand for bytes of a name that is not UTF-8
        path = Path(text).expanduser()
        os.lstat(path)
        if not os.path.exists(path) and path.is_symlink():
            target = os.readlink(path)
            raise ConfigError(f"{where}: {text} is a link to {target}, which is not there; mend or remove the link")
        check_regular(path)
    except RuntimeError:
        raise ConfigError(f"{where}: {text!r}: there is no user of that name; write the path in full") from None
    except ValueError:  # UnicodeEncodeError, or a zero byte
        raise ConfigError(f"{where}: {text!r} holds what no file name can, a zero byte or half a character") from None
    except OSError as error:
        if error.errno not in _LEFT_TO_OPENING:
            raise ConfigError(f"{where}: {text}: {error.strerror}; name another place") from None
    return path


def check_regular(path: Path) -> None:
    """Raise OSError for a pipe, a socket or a device: it can be read once at most, and may never end. Folders pass."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError(errno.EINVAL, "a pipe, socket or device, and a file is needed", str(path))


def read_bytes(path: Path) -> bytes:
    """Return what a file holds; OSError, also for a pipe or a device."""
    check_regular(path)
    return path.read_bytes()


@contextlib.contextmanager
def hold(path: Path, option: str, place: Path, verb: str) -> Iterator[None]:
    """Context that holds a lock, by a lock file that it creates; a second process that asks for it is refused.

    The lock ends with the context or with the process, however that dies; a file left behind locks nothing.

    Args:
        path: the lock file; its folder is made if need be.
        option: what the user named the place by, for messages.
        place: what is locked.
        verb: what its holder does there, as "trains in".

    Raises:
        CheckpointError: another process holds it, or it cannot be locked.
    """
    missing = [folder for folder in path.parents if not folder.exists()]
    handle = _lock_file(path, option, place, verb)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is still locked, so that only our own can be removed
        os.close(handle)
        with contextlib.suppress(OSError):  # where something was written; a refused command leaves no empty folders
            for folder in missing:
                folder.rmdir()


def lock_beside(place: Path) -> Path:
    """Return the lock file of an output that is replaced: beside it, or where it is a link, beside what it leads to."""
    place = Path(os.path.realpath(place))
    return place.parent / f".{place.name}.lock"


def _lock_file(path: Path, option: str, place: Path, verb: str) -> int:
    """Create and lock a lock file and write our process id into it; return its descriptor."""
    while True:
        handle = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(handle, path):
                os.ftruncate(handle, 0)
                os.write(handle, str(os.getpid()).encode())
                return handle
        except BlockingIOError:
            assert handle is not None
            holder = os.pread(handle, 32, 0).decode("ascii", "replace").strip() or "unknown"
            os.close(handle)
            raise CheckpointError(
                f"{option}: another process (pid {holder}) {verb} {place}; wait for it or give {option} another place"
            ) from None
        except OSError as error:
            if handle is not None:
                os.close(handle)
            raise CheckpointError(
                f"{option}: {place} cannot be locked against a second process ({error.strerror}); choose a folder that "
                "you may write, on a file system with locks"
            ) from None
        os.close(handle)  # its holder ended and removed it between our opening and our locking it


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Context that puts a file's path into an OSError that names none, such as one of a write."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _is_at(handle: int, path: Path) -> bool:
    """Say whether an open file still lies at a path."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def part_of(final: Path, folder: bool = False) -> Iterator[Path]:
    """Context with an empty file or folder beside `final`, for the caller to fill; at the end it is renamed to `final`.

    After an exception it is removed, and what is at `final` stays. The new file gets the permissions of the one that it
    replaces; where `final` is a link, what it leads to is replaced. Parts that dead processes left are removed first.

    Args:
        final: a file, there or not; with `folder` an empty folder, or none.

    Raises:
        OSError: it cannot be written; names the part or `final`.
    """
    final = Path(os.path.realpath(final))  # also of what is not there
    remove_dead(final.parent, re.compile(rf"\.{re.escape(final.name)}\.(\d+)\.part"))
    part = final.parent / f".{final.name}.{os.getpid()}.part"
    if folder:
        if os.path.ismount(final) or final == Path.cwd():  # a shell in it would be left in a folder that is gone
            problem = "a mount point or the current folder, which another cannot take the place of"
            raise OSError(errno.EBUSY, problem, str(final))
        part.mkdir()
    else:
        part.touch(exist_ok=False)
    with _locked(part):
        try:
            with naming(final):
                yield part
            if not folder and final.exists():
                with contextlib.suppress(PermissionError):  # a file system without permissions
                    shutil.copymode(final, part)
            part.replace(final)
        finally:
            remove(part)


@contextlib.contextmanager
def temporary_folder(prefix: str) -> Iterator[Path]:
    """Context with a new temporary folder; first removes those of the same prefix whose process has died."""
    among = Path(tempfile.gettempdir())
    remove_dead(among, re.compile(rf"{re.escape(prefix)}(\d+)-\w+"))
    with tempfile.TemporaryDirectory(prefix=f"{prefix}{os.getpid()}-", dir=among, ignore_cleanup_errors=True) as name:
        with _locked(Path(name)):
            yield Path(name)


def remove_dead(folder: Path, pattern: re.Pattern[str]) -> None:
    """Remove a folder's parts whose process is provably gone: the names of `pattern`, its first group a process id."""
    with contextlib.suppress(OSError):
        for path in list(folder.iterdir()):
            if (match := pattern.fullmatch(path.name)) and _is_dead(path, int(match[1])):
                remove(path)


def _is_dead(path: Path, process: int) -> bool:
    """Say whether a part is this user's, its process is gone from this machine, and no other machine has it locked."""
    try:
        if path.is_symlink() or path.stat().st_uid != os.getuid():
            return False
        if process != os.getpid():  # ours is an earlier process's: containers give the same numbers again and again
            with contextlib.suppress(ProcessLookupError, OverflowError):
                os.kill(process, 0)
                return False
        handle = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            os.close(handle)
    except OSError:  # locked, not ours to read, or without locks: not proven
        return False
    return True


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Context that locks a part, which shows other machines, too, that it is still written."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks, where nobody can prove anything either
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Remove a file or a folder; what cannot be removed stays, without an error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
