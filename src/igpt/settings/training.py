"""Settings of the tasks that train a network."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from igpt.settings.fields import Count, Decay, NonNegative, Positive, Settings, Share, WeightDecay, WholeNumber


class LossWeights(Settings):
    """λ: the weights of L_GEN and L_CLF in the joint loss; 1 and 1 in the paper (Chen et al. 2020, §2.3)."""

    gen: NonNegative
    clf: Positive


class TrainingSettings(Settings):
    """Settings of every task with optimiser steps; recipes are in `conf/task/`."""

    steps: Count  # optimiser steps
    batch_size: Count  # images per optimiser step, over all devices
    log_every: Count  # optimiser steps
    checkpoint_every: Count  # optimiser steps
    weight_decay: WeightDecay


class AdamSettings(TrainingSettings):
    """Settings of Adam, its schedule and the number of checkpoints."""

    learning_rate: Positive
    beta1: Decay
    beta2: Decay
    warmup_steps: WholeNumber
    checkpoint_keep: Count
    length: ClassVar[str] = "task.steps"  # settings that decide how long the training is

    @model_validator(mode="after")
    def _check_warmup(self) -> "AdamSettings":
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"task.warmup_steps {self.warmup_steps} must be below task.steps {self.steps}: lower the warm-up, or "
                f"raise {self.length}"
            )
        return self

    @property
    def adam(self) -> dict[str, float]:
        """Keyword arguments of the optimiser."""
        return self.model_dump(include={"learning_rate", "beta1", "beta2", "weight_decay"})


class PretrainSettings(AdamSettings):
    """`task=pretrain`. Recipe: Chen et al. 2020, §3.1."""

    optimizer: Literal["adam", "muon"]
    val_every: WholeNumber  # optimiser steps; 0: only at the end
    operations: Positive | None  # FLOP of the whole training; null once they have decided `steps`
    schedule: Literal["cosine", "wsd"]
    decay_share: Share | None  # of the steps up to a cooled one, in which the rate falls to zero; wsd's alone
    ema: Decay | None  # of the average of the weights over optimiser steps; None: no average
    gradient_clip: Positive | None  # largest norm of a step's gradient
    cooled_at: list[Count]  # optimiser steps before the last at which the rate of wsd has fallen to zero
    keep_steps: list[Count]  # optimiser steps whose weights are kept for good
    length: ClassVar[str] = "task.steps or task.operations"

    @model_validator(mode="after")
    def _check_keep_steps(self) -> "PretrainSettings":
        kept = self.keep_steps
        if kept != sorted(set(kept)) or (kept and kept[-1] > self.steps):
            raise ValueError(
                f"task.keep_steps {kept} must rise, within 1 … task.steps {self.steps}: leave out those that do not, "
                "or all, task.keep_steps=[]"
            )
        return self

    @model_validator(mode="after")
    def _check_schedule(self) -> "PretrainSettings":
        if self.schedule == "cosine":
            if self.decay_share is not None or self.cooled_at:
                raise ValueError(
                    "task.decay_share and task.cooled_at are settings of task.schedule=wsd, got task.schedule=cosine: "
                    "choose wsd, or leave them out"
                )
            return self
        if self.decay_share is None:
            raise ValueError("task.schedule=wsd needs task.decay_share, the share of the steps that cools, as 0.2")
        before, of_before = self.warmup_steps, f"the warm-up (task.warmup_steps {self.warmup_steps})"
        for end in (*self.cooled_at, self.steps):
            key = "task.steps" if end == self.steps else "task.cooled_at"
            if end <= before or end > self.steps:
                raise ValueError(
                    f"task.cooled_at {self.cooled_at} must rise, from above task.warmup_steps {self.warmup_steps} to "
                    f"below task.steps {self.steps}"
                )
            if end * (1 - self.decay_share) < before:
                raise ValueError(
                    f"{key} {end}: its cool-down, the last {self.decay_share:g} of the steps, would begin before "
                    f"{of_before} has ended: lower task.decay_share, or cool later"
                )
            before, of_before = end, f"the one to task.cooled_at {end}"
        return self

    def check_sharded(self, strategy: str) -> None:
        """Raises ValueError for what DeepSpeed, which hides weights in flat partitions, cannot do; FSDP2 can."""
        apart = f"trainer={strategy} takes them apart: choose"
        if strategy == "fsdp":
            return
        if self.optimizer == "muon":
            raise ValueError(
                f"task.optimizer=muon works on whole matrices, {apart} task.optimizer=adam, or trainer=fsdp"
            )
        if self.ema is not None:
            raise ValueError(f"task.ema averages whole weights, {apart} task.ema=null, or trainer=fsdp")


class TokenizerTaskSettings(AdamSettings):
    """`task=tokenizer`. Recipe: van den Oord et al. 2017, appendix A.1, with a schedule that ends at zero."""

    gradient_clip: Positive | None  # largest norm of a step's gradient
    decay_share: Share  # of the steps, at the end, in which the learning rate falls to zero
    crop: Count | None  # pixels a side; None: whole images
    val_every: WholeNumber  # optimiser steps; 0: only at the end
    compare_with: list[str]
    patches: bool


class FinetuneSettings(AdamSettings):
    """`task=finetune`. Recipe: Chen et al. 2020, §2.3 and §3.1."""

    gradient_clip: Positive | None  # largest norm of a step's gradient
    loss_weights: LossWeights
    eval_masks: Count
    val_every: Count  # optimiser steps
    patience: Count | None
    dropout: Annotated[float, Field(ge=0, le=0.9)]
    resize_positions: bool
    refit: bool
    test: bool

    @model_validator(mode="after")
    def _check_validations(self) -> "FinetuneSettings":
        if self.val_every > self.steps:
            raise ValueError(
                f"task.val_every {self.val_every} is more than task.steps {self.steps}: no validation would be reached"
            )
        return self
