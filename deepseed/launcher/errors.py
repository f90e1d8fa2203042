"""What a user of the launcher got wrong."""

from __future__ import annotations


class LaunchError(ValueError):
    """Flags, a hostfile or a script that cannot be served: says what, where and the fix."""
