"""Resources: where and how a stage runs. Never identity: changing them changes no fingerprint and no result beyond rounding."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from rlhf_core.cluster import Cluster, LauncherName
from rlhf_core.specs import Frozen, Positive, StageName

Offload = Literal["none", "cpu", "nvme"]
ModelRole = Literal["actor", "critic", "reference", "reward"]
MEMORY_FIELDS = ("zero_stage", "offload_optimizer", "offload_parameters", "nvme_path", "gradient_checkpointing")


class CheckpointPlan(Frozen):
    """When a job saves its progress, and how much of it is kept."""

    every_minutes: Annotated[float, Field(gt=0)] | None = Field(
        default=10, description="save when so much time has passed; null: not by time"
    )
    every_steps: Positive | None = Field(default=None, description="save after so many steps (PPO: rollouts)")
    keep: Positive = Field(default=2, description="newest checkpoints kept")
    milestone_steps: Positive | None = Field(
        default=None, description="keep for good what is saved after every so many steps"
    )
    grace_seconds: Annotated[float, Field(ge=1, lt=25)] = Field(
        default=20,
        description="a job that is told to end has so long to save; Prefect kills a cancelled flow after 30 s",
    )
    notice: str | None = Field(
        default=None,
        description="file that appears, or URL that answers 200, when this machine is about to be taken away",
    )


class Resources(Frozen):
    """One job's processes, memory layout and limits."""

    launcher: LauncherName = Field(
        default="local",
        description="local: this machine; hostfile: over ssh; slurm: sbatch and srun; nodes: the caller starts `rlhf node` on each",
    )
    processes: Positive = Field(default=1, description="ranks on each node; one GPU each where there are GPUs")
    cluster: Cluster = Cluster()
    threads: Positive | None = Field(default=None, description="CPU threads a rank; default: cores / processes")
    micro_batch: Positive = Field(default=16, description="sequences a forward pass of training or scoring, per rank")
    micro_tokens: Positive | None = Field(
        default=None,
        description="tokens of such a pass, with padding where there is any: of long rows fewer go together; null: no limit",
    )
    rollout_micro_batch: Positive = Field(default=64, description="sequences generated at once, per rank")
    rollout_engine: Literal["slots", "plain", "generate", "vllm"] = Field(
        default="slots",
        description="slots: rows that end make room for others; plain: whole batches, to compare with; generate: transformers' "
        "own loop, for models that need it; vllm: on GPUs, not tested, other answers",
    )
    rollout_gather: Literal["auto", "once", "layers"] = Field(
        default="auto",
        description="ZeRO 3: the actor's weights whole once a rollout, or layer by layer at every pass; auto: once where half of "
        "what every rank has free is enough",
    )
    rollout_lora: Literal["auto", "merged", "applied"] = Field(
        default="auto",
        description="LoRA in rollouts: added to a copy of the weights, or computed beside them; auto: merged where half of what "
        "every rank has free is enough",
    )
    zero_stage: Annotated[int, Field(ge=0, le=3)] = Field(
        default=0, description="what DeepSpeed divides among the ranks"
    )
    offload_optimizer: Offload = Field(default="none", description="where the optimizer's state lies (ZeRO 1 to 3)")
    offload_parameters: Offload = Field(default="none", description="where weights lie while unused (ZeRO 3)")
    nvme_path: str | None = Field(default=None, description="folder on a fast disk, for offload to nvme")
    gradient_checkpointing: bool = False
    pack_tokens: Positive | None = Field(
        default=None, description="SFT: join sequences to rows of up to so many tokens, which do not see each other"
    )
    models: dict[ModelRole, dict[str, int | bool | str | None]] = Field(
        default={}, description="PPO, per model: memory fields that differ, e.g. {reference: {offload_parameters: cpu}}"
    )
    checkpoint: CheckpointPlan = CheckpointPlan()
    data_workers: Positive | None = Field(default=None, description="processes that tokenise; default: the cores")
    stall_minutes: Annotated[float, Field(gt=0)] = Field(
        default=10, description="no sign of progress for so long: stacks, then kill"
    )
    timeout_hours: Annotated[float, Field(gt=0)] = Field(default=72, description="longest run of one attempt")
    price_per_process_hour: Annotated[float, Field(ge=0)] | None = Field(
        default=None, description="what an hour of one process costs, in any currency: shown as the cost so far"
    )
    retries: Annotated[int, Field(ge=0)] = Field(
        default=2, description="further attempts after a failure worth retrying"
    )
    retry_delay_seconds: Annotated[float, Field(ge=0)] = 10

    @model_validator(mode="after")
    def _memory(self) -> Self:
        for role, fields in self.models.items():
            if unknown := sorted(set(fields) - set(MEMORY_FIELDS)):
                raise ValueError(f"models.{role}: {unknown[0]!r} is not among {', '.join(MEMORY_FIELDS)}")
            self.of_model(role)
        if self.offload_optimizer != "none" and not self.zero_stage:
            raise ValueError(f"offload_optimizer {self.offload_optimizer!r} needs zero_stage 1, 2 or 3; it is 0")
        if self.offload_parameters != "none" and self.zero_stage != 3:
            raise ValueError(
                f"offload_parameters {self.offload_parameters!r} needs zero_stage 3; it is {self.zero_stage}"
            )
        if "nvme" in (self.offload_optimizer, self.offload_parameters) and not self.nvme_path:
            raise ValueError("offload to nvme needs nvme_path, a folder on a fast disk")
        return self

    @model_validator(mode="after")
    def _nodes(self) -> Self:
        self.check_nodes()
        return self

    def check_nodes(self) -> None:
        """ValueError if launcher and cluster do not go together."""
        launcher, cluster = self.launcher, self.cluster
        if launcher == "hostfile" and not cluster.hosts:
            raise ValueError("launcher hostfile needs cluster.hosts: the path of a hostfile, or a list of hosts")
        if launcher in ("slurm", "nodes") and not cluster.nodes:
            raise ValueError(f"launcher {launcher} needs cluster.nodes, the number of machines")
        only: dict[str, Any] = {} if launcher == "hostfile" else dict.fromkeys(("hosts", "include", "exclude"))
        only |= dict.fromkeys(("nodes", "min_nodes"), 1) if launcher == "local" else {}
        for name, nothing in only.items():
            if getattr(cluster, name) not in (None, nothing):
                raise ValueError(
                    f"cluster.{name} is given, but launcher {launcher} does not heed it"
                    + (" and runs on this machine alone" if launcher == "local" else "")
                    + "; set launcher hostfile, or take it out"
                )

    def of_model(self, role: ModelRole) -> "Resources":
        """The resources of one of PPO's models."""
        own = self.models.get(role, {})
        return Resources.model_validate({**self.model_dump(exclude={"models", "stages"}), **own})


class ResourceTable(Resources):
    """Resources of all stages, and per stage what differs."""

    stages: dict[StageName, dict[str, Any]] = Field(
        default={}, description="per stage: fields that differ, e.g. {ppo: {micro_batch: 4}}"
    )

    @model_validator(mode="after")
    def _nodes(self) -> Self:
        if not any("launcher" in own for own in self.stages.values()):  # else the cluster may be those stages'
            self.check_nodes()
        return self

    def of(self, stage: StageName) -> Resources:
        """The resources of one stage; the data stage is always one process on this machine."""
        merged = {**self.model_dump(exclude={"stages"}), **self.stages.get(stage, {})}
        if stage == "data" or (merged["launcher"] == "local" and "cluster" not in self.stages.get(stage, {})):
            merged |= {"launcher": "local", "cluster": {}}
        return Resources.model_validate(merged)
