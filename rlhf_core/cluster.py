"""Cluster: which machines a job runs on, and how they are reached. Part of Resources, so never identity.

Four launchers start the same two commands, `rlhf_core.head` beside the control plane and `rlhf_core.node` on every node:
`hostfile` over ssh, `slurm` by sbatch and srun, `nodes` by whoever the caller has (Kubernetes, another batch system). `local`
needs neither. Here: what people write (a DeepSpeed hostfile or a list of hosts, include and exclude in DeepSpeed's syntax),
checked, and the nodes it comes to. Credentials are not among it: they reach nodes by their own environment or role, or over
ssh's standard input (`forward`).
"""

import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from rlhf_core.spec_base import Frozen, Positive

LauncherName = Literal["local", "hostfile", "slurm", "nodes"]
HOST_NAME = r"^[A-Za-z0-9_][A-Za-z0-9_.:@-]*$"
HostName = Annotated[str, Field(pattern=HOST_NAME, max_length=253)]
Variable = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
# Not DS_ACCELERATOR and OMP_*: which device and how many threads there are is for each node to say.
FORWARDED = ("AWS_*", "HF_*", "RLHF_*", "NCCL_*", "GLOO_*", "TORCH_*", "*_proxy", "*_PROXY")
SECRET = re.compile(
    r"SECRET|PASSWORD|PASSWD|PASSPHRASE|TOKEN(?:_|$)|CREDENTIAL|APIKEY|(?:API|ACCESS|PRIVATE)_KEY", re.IGNORECASE
)
PLACE = re.compile(r"_(?:FILE|PATH|DIR|URI|URL)$", re.IGNORECASE)  # says where a secret is, not what it is


class Host(Frozen):
    """One machine of a list of hosts."""

    host: HostName = Field(description="name or address that ssh connects to, USER@HOST too")
    slots: Positive | None = Field(default=None, description="processes it has room for; default: resources.processes")
    env: dict[Variable, str] = Field(default={}, description="environment of its processes alone")

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, raw: Any) -> Any:
        return {"host": raw} if isinstance(raw, str) else raw


class SlurmPlan(Frozen):
    """What sbatch is told."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time_limit: str | None = Field(default=None, description="as sbatch takes it: minutes, H:M:S or D-H:M:S")
    options: tuple[str, ...] = Field(default=(), description="further options of sbatch, e.g. --gres=gpu:8")


class Cluster(Frozen):
    """The nodes of a job that does not run on one machine alone."""

    nodes: Positive | None = Field(
        default=None,
        description="machines; default: all that hostfile, include and exclude leave (slurm, nodes: needed)",
    )
    min_nodes: Positive | None = Field(
        default=None, description="go on with so few when nodes have failed twice; default: never with fewer"
    )
    hosts: str | tuple[Host, ...] | None = Field(
        default=None, description="launcher hostfile: path of a DeepSpeed hostfile, or the hosts themselves"
    )
    include: str | None = Field(default=None, description="only these, as DeepSpeed writes it: node1@node2:0,2")
    exclude: str | None = Field(default=None, description="not these, in the same syntax")
    env: dict[Variable, str] = Field(default={}, description="environment of all processes on all nodes")
    forward: tuple[str, ...] = Field(
        default=FORWARDED,
        description="variables of the control plane that travel to the nodes over ssh, never through the store",
    )
    python: str | None = Field(default=None, description="interpreter on the nodes; default: this one's path")
    ssh: tuple[str, ...] = Field(
        default=("ssh",), description="the ssh command and its options, e.g. [ssh, -p, '2222']"
    )
    start_seconds: Annotated[float, Field(ge=5)] = Field(
        default=120, description="all nodes must have reported after so long (slurm: counted from the job's start)"
    )
    max_skew_seconds: Annotated[float, Field(gt=0)] = Field(
        default=60, description="largest difference between the clocks of a node and the control plane"
    )
    slurm: SlurmPlan = SlurmPlan()

    @model_validator(mode="after")
    def _selection(self) -> Self:
        if self.include and self.exclude:
            raise ValueError("cluster.include and cluster.exclude exclude each other; keep one")
        if self.min_nodes and self.nodes and self.min_nodes > self.nodes:
            raise ValueError(f"cluster.min_nodes {self.min_nodes} is more than cluster.nodes {self.nodes}; lower it")
        return self

    @model_validator(mode="after")
    def _no_credentials(self) -> Self:
        listed = [] if self.hosts is None or isinstance(self.hosts, str) else self.hosts
        for field, env in (("env", self.env), *((f"hosts: {host.host}.env", host.env) for host in listed)):
            if found := secret_names(env):
                raise ValueError(
                    f"cluster.{field}: {found[0]} is a credential by its name, and this would be written into records and logs; "
                    "set it in this process's environment and let it travel (cluster.forward), or on the nodes themselves"
                )
        return self


def secret_names(names: Iterable[str]) -> list[str]:
    """Those of some variables' names that say that the value is a secret."""
    return [name for name in names if SECRET.search(name) and not PLACE.search(name)]
