"""Which rank a process is, where srun or mpirun has started it: their variables, in torchrun's names.

    srun -n 8 python train.py          mpirun -n 8 python train.py
"""

from __future__ import annotations

import os
import re
from collections.abc import MutableMapping

from deepseed.runtime.errors import AgreementError

PORT = 29500
NAMES = (  # rank, world size, local rank, local size
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)


def adopt(environment: MutableMapping[str, str] | None = None) -> bool:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT from what a cluster's starter says, where they are not set; whether they are
    set now. A job of one task is no launch. Raises AgreementError where ranks are on several nodes and nothing says where rank 0 is.

    >>> e = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_NODELIST": "gpu[07-08,11],login", "SLURM_JOB_ID": "123456", "SLURM_STEP_ID": "0"}
    >>> adopt(e), e["RANK"], e["WORLD_SIZE"], e["LOCAL_RANK"], e["MASTER_ADDR"], e["MASTER_PORT"]
    (True, '3', '8', '1', 'gpu07', '32956')
    """
    env = os.environ if environment is None else environment
    if "RANK" in env and "WORLD_SIZE" in env:
        return "MASTER_ADDR" in env
    for rank, size, local, local_size in NAMES:
        if rank not in env or int(env.get(size, "1")) < 2 or ("SLURM" in rank and "SLURM_STEP_ID" not in env):
            continue
        if "SLURM" not in rank and "MASTER_ADDR" not in env and env[size] != env.get(local_size, env[size]):
            raise AgreementError(f"{env[size]} ranks on several nodes, and none says where rank 0 is\n  fix: mpirun -x MASTER_ADDR=HOST, the host of rank 0")
        env["RANK"], env["WORLD_SIZE"] = env[rank], env[size]
        env.setdefault("LOCAL_RANK", env.get(local, "0"))
        if env.get(local_size, "").isdigit():
            env.setdefault("LOCAL_WORLD_SIZE", env[local_size])
        job = int(re.sub(r"\D", "", env.get("SLURM_JOB_ID", "") or "0") or 0)
        env.setdefault("MASTER_ADDR", first_host(env.get("SLURM_STEP_NODELIST") or env.get("SLURM_NODELIST") or "127.0.0.1"))
        env.setdefault("MASTER_PORT", str(PORT + job % 10000 if job else PORT))  # two jobs on one node do not meet
        return True
    return False


def first_host(nodes: str) -> str:
    """
    >>> first_host("gpu[07-08,11]"), first_host("a,b"), first_host("rack[1-2]-n[3,4]")
    ('gpu07', 'a', 'rack1-n3')
    """
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    assert first is not None
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first.group())
