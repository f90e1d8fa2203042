"""Ranks that srun or mpirun started."""

from __future__ import annotations

import pytest

from deepseed.runtime.environment import adopt
from deepseed.runtime.errors import AgreementError


def test_mpirun_on_one_node() -> None:
    e = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    assert adopt(e) and (e["RANK"], e["WORLD_SIZE"], e["LOCAL_RANK"], e["MASTER_ADDR"], e["MASTER_PORT"]) == ("1", "2", "1", "127.0.0.1", "29500")


def test_mpirun_on_several_nodes_needs_the_first() -> None:
    e = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
    with pytest.raises(AgreementError, match="MASTER_ADDR=HOST"):
        adopt(e)
    assert adopt(e | {"MASTER_ADDR": "n0"}) and "RANK" not in e


def test_torchruns_own_words_count_first() -> None:
    e = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "SLURM_PROCID": "1", "SLURM_NTASKS": "4", "SLURM_STEP_ID": "0"}
    assert adopt(e) and e["RANK"] == "0"


@pytest.mark.parametrize("e", [{}, {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_STEP_ID": "0"}, {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}])
def test_what_is_no_launch(e: dict[str, str]) -> None:
    """No starter; one task; the shell of an allocation, outside of srun."""
    assert not adopt(e) and "RANK" not in e
