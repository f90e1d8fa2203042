"""What the system refuses (OSError), as a user reads it: which path, why, and what helps."""

from __future__ import annotations

import errno

_FIXES = {
    (errno.ENOENT,): "give a path that is there",
    (errno.EACCES, errno.EPERM): "give a path that this user may read, or for a result write, or change its permissions",
    (errno.ENOTDIR,): "give a folder whose parents are folders",
    (errno.EISDIR,): "give a file, not a folder",
    (errno.EEXIST, errno.ENOTEMPTY): "give a path where nothing is yet",
    (errno.ENOSPC, errno.EDQUOT, errno.EFBIG): "make room, or write to another disk",
    (errno.EROFS,): "write to another disk",
    (errno.ENAMETOOLONG, errno.ELOOP): "give another path",
    (errno.EMFILE, errno.ENFILE): "allow more open files: ulimit -n",
}


def named(error: OSError) -> str:
    """What the system refused, of which path, and what helps."""
    if "\n  fix:" in str(error):
        return str(error)
    path = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    text = f"{path}: {error.strerror}" if path and error.strerror else str(error) or type(error).__name__
    return f"{text}\n  fix: " + next((fix for numbers, fix in _FIXES.items() if error.errno in numbers), "look at the disk, and at what the path names")
