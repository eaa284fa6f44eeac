"""Changes of setting names between versions of the records of saved runs: the table that `older_configs` applies."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Joined:
    """Switches that became one list. A stage of a pipeline has the entries of `default` on unless it sets them."""

    entries: Mapping[str, str]  # entry → key of its old switch
    default: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # task → entries on by default


@dataclass(frozen=True)
class Changes:
    """Changes of setting names in one version of the records. Keys are dotted and apply to pipeline stages, too
    (`PLACES`); `targets`, `values` and `joined` use the old keys, before `renamed` is applied.
    """

    targets: Mapping[str, str] = field(default_factory=dict)  # `_target_`, or a module with its contents → new name
    values: Mapping[str, Mapping[Any, Any]] = field(default_factory=dict)  # key → {old value or list entry: new one}
    joined: Mapping[str, Joined] = field(default_factory=dict)  # key of the new list → its old switches
    renamed: Mapping[str, str | None] = field(default_factory=dict)  # old key → new key; None: removed
    added: Mapping[str, tuple[str, Any, Any]] = field(default_factory=dict)
    # new key → (another key, its value, several in a tuple, or ...: any, value of the new key in such a config)


# choices of a network that releases before version 4 had not
NETWORK: dict[str, str | bool | None] = {
    "attention": "full",
    "activation": "quick_gelu",
    "radius": None,
    "stride": None,
}
NETWORK |= dict.fromkeys(("relative_bias", "qk_norm", "value_residual"), False)
TABLE: dict[int, Changes] = {
    2: Changes(
        targets={
            "igpt.model.gpt.GPT": "igpt.model.config.GPTConfig",
            "igpt.tokens.kmeans.fitted": "igpt.tokens.kmeans.fit_cached",
            "igpt.tokens.palette.given": "igpt.tokens.palette.from_file",
            "igpt.probe.watch.ProbeWhileTraining": "igpt.training.online_probe.OnlineLinearProbe",
            "igpt.report.callbacks": "igpt.training.callbacks",
            "igpt.report.loggers": "igpt.training.loggers",
            "igpt.task.machine.Machine": "igpt.training.hardware.HardwareConfig",
            "igpt.task.palette": "igpt.task.evaluate_palette",
        },
        values={"task.needs": {"net": "network", "found": "finished_runs", "stage": "stages"}},
        joined={
            "task.baselines": Joined(
                {"untrained": "task.untrained", "pixels": "task.pixels"},
                default={"probe": ("untrained", "pixels"), "low_data": ("pixels",)},
            )
        },
        renamed={
            "force": "rerun",
            "data.n_colour": "data.palette_size",
            "data.stream.held": "data.stream.held_in_memory",
            "data.stream.lanes": "data.stream.num_readers",
            "task.beside": "task.compare_with",
            "task.concat": "task.concat_layers",
            "task.masks": "task.eval_masks",
            "task.strengths": "task.C_grid",
            "trainer.attention": "trainer.attention_backend",
            "trainer.checkpoint_in_pieces": "trainer.sharded_checkpoint",
            "task.gen": "task.loss_weights.gen",
            "task.clf": "task.loss_weights.clf",
            "task.needs": "task.requires",
        },
        added={
            "tokens._target_": ("tokens.palette._target_", ..., "igpt.tokens.palette_tokenizer.PaletteSettings"),
            "model.positions": ("model._target_", "igpt.model.config.GPTConfig", "learned"),
            "data.layout": ("data._target_", "igpt.data.images.Images", "auto"),
        },
    ),
    3: Changes(),  # paths to read are absolute in the config; older ones are relative to the folder the run started in
    4: Changes(
        added={
            "task.operations": ("task._target_", "igpt.task.pretrain.run", None),
            "task.schedule": ("task._target_", "igpt.task.pretrain.run", "cosine"),
            "task.decay_share": ("task._target_", "igpt.task.pretrain.run", None),
            "task.cooled_at": ("task._target_", "igpt.task.pretrain.run", []),
            "task.ema": ("task._target_", "igpt.task.pretrain.run", None),
            "task.gradient_clip": ("task._target_", ("igpt.task.pretrain.run", "igpt.task.finetune.run"), None),
            **{
                f"model.{key}": ("model._target_", "igpt.model.config.GPTConfig", value)
                for key, value in NETWORK.items()
            },
        },
    ),
    5: Changes(
        values={
            "task.paper": {"scaling": "figure3"},
            "task.refit": {True: "auto"},  # which solver=sgd passed over
        },
        added={
            "task.keep_steps": ("task._target_", "igpt.task.pretrain.run", []),
            "task.probe_data": ("task._target_", "igpt.task.scaling.run", None),
            "task.split": ("task._target_", "igpt.task.scaling.run", "val"),
            "task.curves": ("task._target_", "igpt.task.pipeline.run", {}),
            "task.eval_masks": ("task._target_", "igpt.task.scaling.run", 1),
            "task.refit": ("task._target_", "igpt.task.finetune.run", False),
            "task.dropout": ("task._target_", "igpt.task.finetune.run", 0.0),
            "task.resize_positions": ("task._target_", ("igpt.task.finetune.run", "igpt.task.probe.run"), False),
            "task.sgd.search": ("task._target_", "igpt.task.probe.run", "together"),
            "task.sgd.augment": ("task._target_", "igpt.task.probe.run", True),
        },
    ),
    6: Changes(
        targets={"igpt.training.callbacks.ProgressBar": "igpt.training.progress_bar.ProgressBar"},
        values={"trainer.utilisation": {0.4: None}},  # which was assumed
        added={
            "trainer.lightning": ("trainer._target_", ..., {}),
            "trainer.bandwidth_gbs": ("trainer._target_", ..., None),
            "task.gradient_clip": ("task._target_", "igpt.task.train_tokenizer.run", None),
            "task.sgd.gradient_clip": ("task._target_", "igpt.task.probe.run", None),
            "task.push": ("task._target_", "igpt.task.export_weights.run", None),
            "task.private": ("task._target_", "igpt.task.export_weights.run", None),
        },
    ),
}
