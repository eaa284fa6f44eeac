"""Makes the run folders of an older commit anew: `python tests/older_runs/make.py CHECKOUT FOLDER`.

CHECKOUT: a clone at that commit, in whose environment this runs. FOLDER: an empty folder outside it, whose path stays
in the records (the committed ones were made in `/tmp/igpt`); what is to be committed ends in `FOLDER/kept`.
"""

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

TINY = ("model=igpt_nano", "model.n_layer=1", "model.n_embd=8", "model.n_head=2", "trainer=cpu")
OFTEN = ("val_every=4", "log_every=2", "checkpoint_every=4", "checkpoint_keep=1")
PRETRAIN = (*TINY, "task.steps=12", "task.batch_size=32", "task.warmup_steps=2", *(f"task.{each}" for each in OFTEN))
FINETUNE = (
    "task=finetune", "model=checkpoint", "tokens=checkpoint", "objective=checkpoint", "trainer=cpu", "task.steps=12",
    "task.batch_size=64", "task.learning_rate=0.05", "task.gen=0.5", "task.masks=3",
    *(f"task.{each}" for each in OFTEN),
)  # fmt: skip
PIPELINE = (
    *TINY, "task=pipeline", "+task.stages.palette.split=val", "+task.stages.pretrain.steps=12",
    "+task.stages.pretrain.batch_size=32", "+task.stages.pretrain.warmup_steps=2",
    *(f"+task.stages.pretrain.{each}" for each in OFTEN),
    "+task.stages.evaluate={split: val, batch_size: 64, masks: 3}",
    "+task.stages.probe.strengths=[0.01,1.0]", "+task.stages.probe.untrained=false", "+task.stages.probe.pixels=false",
    "+task.stages.finetune.gen=0.5", "+task.stages.finetune.steps=12", "+task.stages.finetune.batch_size=64",
    "+task.stages.finetune.learning_rate=0.05",
    *(f"+task.stages.finetune.{each}" for each in OFTEN),
)  # fmt: skip
STOPPED_AFTER = 4  # steps: the signal comes when that checkpoint is written, the run ends after one step more
TRAIN = f"""
import os, runpy, signal, sys
if sys.argv.pop(1) == "stopped":
    from igpt.task import checkpoints
    mark = checkpoints.mark_latest
    def mark_and_stop(path, **how):
        mark(path, **how)
        if path.stem == "step_{STOPPED_AFTER:07d}":
            os.kill(os.getpid(), signal.SIGTERM)
    checkpoints.mark_latest = mark_and_stop
sys.argv[0] = "train.py"
runpy.run_path("train.py", run_name="__main__")
"""
TO_LOOK_AT = ("*.png", "*.html", "log.txt", ".lock", "samples", "metrics")


def arithmetic() -> dict[str, str]:
    """What decides how floats round here: with the same, the same run gives the same bits."""
    import torch

    x = torch.arange(4096, dtype=torch.float32).sin().reshape(64, 64)
    made = torch.nn.functional.gelu(x @ x.cos()).softmax(-1).log()
    command = shlex.split(os.environ.get("CC", "cc"))
    version = ""
    if shutil.which(command[0]) is not None:
        version = subprocess.run([*command, "--version"], capture_output=True, text=True).stdout.partition("\n")[0]
    return {
        "compiler": version,
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "rounding": hashlib.sha256(made.numpy().tobytes()).hexdigest()[:16],
    }


def main(checkout: Path, folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(checkout / "src"), "OMP_NUM_THREADS": "1"}
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("train.py", "conf"):
        (folder / name).symlink_to(checkout / name)  # so that the command in the records is `python train.py`

    def train(how: str, *overrides: str) -> Path:
        before = {*(folder / "runs").glob("*")}
        done = subprocess.run([sys.executable, "-c", TRAIN, how, *overrides], cwd=folder, env=environment)
        assert done.returncode == (75 if how == "stopped" else 0), done
        (run,) = {*(folder / "runs").glob("*")} - before
        kept = folder / "kept" / how / run.name
        shutil.copytree(run, kept, ignore=shutil.ignore_patterns(*TO_LOOK_AT))
        return run

    run = train("finished", *PRETRAIN)
    for command in ((*FINETUNE, f"init={run.relative_to(folder)}"), PIPELINE):
        for how in ("stopped", "finished"):
            shutil.rmtree(train(how, *command))
    shutil.rmtree(run)
    train("stopped", *PRETRAIN)
    for pipeline in (folder / "kept" / "finished").glob("pipeline-*"):
        for checkpoints in pipeline.glob("*/checkpoints"):
            shutil.rmtree(checkpoints)
    (folder / "kept" / "made_on.json").write_text(json.dumps({**arithmetic(), "threads": "1"}, indent=2) + "\n")


if __name__ == "__main__":
    main(*(Path(argument).resolve() for argument in sys.argv[1:]))
