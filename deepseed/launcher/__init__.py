"""``deepseed [flags] script.py [arguments]``: start a script on ranks, as the ``deepspeed`` command does, by torchrun's own machinery.

    options    the flags
    hosts      which nodes and which slots of them: a hostfile, --include and --exclude
    nodes      one launcher on each node, by ssh or pdsh
    node       this node's ranks: started, watched, ended together
    rank       one rank, before the script begins: its cores, its log, its arguments
"""

from __future__ import annotations

from collections.abc import Sequence

from deepseed.launcher.errors import LaunchError
from deepseed.launcher.hosts import nodes_of
from deepseed.launcher.options import parse
from deepseed.logs import fail


def main(arguments: Sequence[str]) -> int:
    """The exit code: 0, that of the rank that failed first (128 + n where signal n ended it), or 2 for a mistake in the flags."""
    try:
        options = parse(arguments)
        nodes = nodes_of(options)
        if options.node_rank is None and (len(nodes) > 1 or options.force_multi):
            from deepseed.launcher.nodes import run_nodes

            return run_nodes(options, nodes)
        from deepseed.launcher.node import run_node

        return run_node(options, nodes)
    except LaunchError as error:
        fail(str(error))
        return 2
