"""Resources: where and how a stage runs. Never identity: changing them changes no fingerprint and no result beyond rounding."""

from typing import Annotated, Literal

from pydantic import Field

from rlhf_core.specs import Frozen, Positive, StageName


class Resources(Frozen):
    """One job's processes, memory layout and limits."""

    launcher: Literal["local"] = Field(default="local", description="this machine, through the deepspeed launcher")
    processes: Positive = Field(default=1, description="ranks; one GPU each where there are GPUs")
    threads: Positive | None = Field(default=None, description="CPU threads a rank; default: cores / processes")
    micro_batch: Positive = Field(default=16, description="sequences a forward pass of training or scoring, per rank")
    rollout_micro_batch: Positive = Field(default=64, description="sequences generated at once, per rank")
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 0
    gradient_checkpointing: bool = False
    data_workers: Positive | None = Field(default=None, description="processes that tokenise; default: the cores")
    stall_minutes: Annotated[float, Field(gt=0)] = Field(
        default=10, description="no sign of progress for so long: stacks, then kill"
    )
    timeout_hours: Annotated[float, Field(gt=0)] = Field(default=72, description="longest run of one attempt")
    retries: Annotated[int, Field(ge=0)] = Field(
        default=2, description="further attempts after a failure worth retrying"
    )
    retry_delay_seconds: Annotated[float, Field(ge=0)] = 10


class ResourceTable(Resources):
    """Resources of all stages, and per stage what differs."""

    stages: dict[StageName, dict[str, int | float | bool | str | None]] = Field(
        default={}, description="per stage: fields that differ, e.g. {ppo: {micro_batch: 4}}"
    )

    def of(self, stage: StageName) -> Resources:
        """The resources of one stage."""
        common = self.model_dump(exclude={"stages"})
        return Resources.model_validate({**common, **self.stages.get(stage, {})})
