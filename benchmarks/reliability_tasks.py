"""The tasks that reliability.py disturbs, and how many kills and errors each gets."""

from dataclasses import dataclass

NET = ("model.n_layer=2", "model.n_embd=16", "trainer=cpu")
DATA = ("data.labels_per_class=4", "data.val_fraction=0.03", "data.test_fraction=0.03")
STEPS = ("steps=6", "batch_size=16", "val_every=3", "log_every=2", "checkpoint_every=2")
FIT = (*DATA, *(f"task.{each}" for each in STEPS), "callbacks.samples.count=4")
PRETRAIN = ("task=pretrain", *NET, *FIT, "task.warmup_steps=2")
PHOTOS = ("data=folder", "data.path=base/photos", "data.n_class=2", "data.resolution=8", "data.palette_size=8")
PROBE = ("task.C_grid=[0.1,1.0]", "task.baselines=[pixels]")
SGD = ("task.solver=sgd", "task.folds=null", "task.sgd.rates=[1.0,0.1]", *(f"task.sgd.{each}" for each in STEPS))
FEW_LABELS = ("data.labels_per_class=null", "task.per_class=[2]", "task.subsets=2", "task.layer=1")
PRETRAIN_STAGE = (f"task.stages.pretrain.{each}" for each in (*STEPS, "warmup_steps=2"))
NO_STAGES = (f"task.stages.{name}=null" for name in ("complete", "probe", "finetune", "scratch"))
FINISHED = "task.runs=[base/pretrained,base/evaluated]"
GROUPS = tuple(f"{group}=checkpoint" for group in ("model", "tokens", "objective"))
ON_CHECKPOINT = ("init=base/pretrained", "data=digits", *GROUPS, "trainer=cpu")
DDP = ("trainer=ddp", "trainer.accelerator=cpu")


@dataclass(frozen=True)
class Task:
    """A command, and how many kills and errors it gets."""

    arguments: tuple[str, ...]
    kills: int = 13
    errors: int = 6
    spawns: bool = False  # a launcher starts its processes
    without: tuple[str, ...] = ()  # parts of the template that are not there


TASKS = {
    "pretrain": Task(PRETRAIN, 36, 20),
    "images": Task((*PRETRAIN, *PHOTOS, "callbacks=probe")),
    "finetune": Task(("task=finetune", *ON_CHECKPOINT, *FIT)),
    "probe": Task(("task=probe", *ON_CHECKPOINT, *DATA, *PROBE)),
    "sgd_probe": Task(("task=probe", *ON_CHECKPOINT, *DATA, *SGD)),
    "low_data": Task(("task=low_data", *ON_CHECKPOINT, *DATA, *PROBE, *FEW_LABELS)),
    "scaling": Task(("task=scaling", "task.runs=[base/pretrained]", "trainer=cpu", *DATA, PROBE[0])),
    "evaluate": Task(("task=evaluate", *ON_CHECKPOINT, *DATA)),
    "sample": Task(("task=sample", *ON_CHECKPOINT, "task.count=4")),
    "complete": Task(("task=complete", *ON_CHECKPOINT, *DATA, "task.count=2", "task.completions=2")),
    "palette": Task(("task=palette", *DATA, "task.count=20")),
    "import": Task(("task=import", "init=base/huggingface", "trainer=cpu")),
    "export": Task(("task=export", *ON_CHECKPOINT)),
    "compare": Task(("task=compare", FINISHED)),
    "report": Task(("task=report", FINISHED)),
    "pipeline": Task(("experiment=quickstart", "data=digits", *NET, *DATA, *PRETRAIN_STAGE, *NO_STAGES), 24, 10),
    "library": Task(("task=sample", *ON_CHECKPOINT, "task.count=4"), 5, 3, without=("xdg",)),
    "wandb": Task((*PRETRAIN, "logger=[csv,wandb]", "logger.wandb.offline=true"), 5, 5),
    "sweep": Task(("-m", "seed=0,1", *PRETRAIN), 14, 6, spawns=True),
    "learning_rate": Task(
        ("-m", "sweep=learning_rate", "hydra.sweeper.values=[0.01,0.003]", *PRETRAIN), 14, 6, spawns=True
    ),
    "ddp": Task((*PRETRAIN, *DDP), 30, 16, spawns=True),
    "ddp_probe": Task(("task=probe", *ON_CHECKPOINT, *DATA, *PROBE, *DDP), 14, 8, spawns=True),
}
SAMPLE = {"pretrain": (2, 1), "evaluate": (1, 1)}
MODULES = (  # what these tasks import when they run
    *("lightning", "torch.utils.serialization", "sklearn.datasets", "sklearn.linear_model"),
    *("matplotlib.backends.backend_agg", "matplotlib.pyplot", "igpt.data.digits"),
    *("igpt.run.launch", "igpt.run.search", "igpt.run.sweep", "igpt.app.compare"),
    *("igpt.training.callbacks", "igpt.training.loggers"),
    *(f"igpt.task.{name}" for name in ("complete", "evaluate", "evaluate_palette", "export_weights", "finetune")),
    *(f"igpt.task.{name}" for name in ("import_weights", "low_data", "pipeline", "pretrain", "probe", "sample")),
    *("igpt.task.scaling", "igpt.task.sgd_probe"),
)
