"""``python tests/mutation_report.py FILE``: one table of the draws that ``test_mutations`` wrote to ``$DEEPSEED_MUTATIONS``."""

from __future__ import annotations

import sys
from pathlib import Path

from mutate import Mutation
from test_mutations import Draw, Table

from deepseed.ir.mesh import Mesh
from deepseed.ir.program import Program

if __name__ == "__main__":
    table = Table()
    nothing = Program("", Mesh(), (), (), ())
    for line in Path(sys.argv[1]).read_text().splitlines():
        where, kind, node, caught, wrong = line.split("\t")
        table.draws.append(Draw(where, Mutation(kind, node, nothing), caught, wrong=wrong))
    print(table)
    print(f"{len({d.where.split()[0] for d in table.draws})} models; {sum(bool(d.wrong) for d in table.draws)} reports without pass, node or module path")
