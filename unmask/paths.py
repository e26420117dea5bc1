"""Paths that a user gives: `~` expanded, and refused where no file of that name can be read or written."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from unmask.errors import ConfigError

_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.EACCES)  # for whoever opens it to say


def user_path(name: str | os.PathLike[str], where: str) -> Path:
    """Return the path of a file or folder that may be there or not.

    Args:
        name: as the user wrote it.
        where: the flag or field that it was given by, for messages.

    Raises:
        ConfigError: a name that no file can have, a link to what is not there, a pipe or a device.
    """
    text = os.fspath(name)
    if not text:
        raise ConfigError(f"{where}: the path is empty; name a file or folder")
    try:
        os.fsencode(text)  # not isprintable: what of a name is not UTF-8 comes as half surrogates of its own
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
        if error.errno not in _NOT_THERE:
            raise ConfigError(f"{where}: {text}: {error.strerror}; name another place") from None
    return path


def check_regular(path: Path) -> None:
    """Raise OSError for a pipe, a socket or a device: it can be read once at most, and may never end."""
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise OSError(errno.EINVAL, "a pipe, socket or device, and a file is needed", str(path))


def read_bytes(path: Path) -> bytes:
    """Return what a file holds; OSError, also for a pipe or a device."""
    check_regular(path)
    return path.read_bytes()
