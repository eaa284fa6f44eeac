"""What two ranks do for `test_ranks_frozen.py`, beside `ranks_work.py`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from igpt.checkpoint.classifier import find_class_head
from igpt.checkpoint.find import find_weights
from igpt.checkpoint.igpt_format import Weights
from igpt.data.source import ArraySplit
from igpt.distributed import ranks
from igpt.metric.result import Result
from igpt.model.generate import generate
from igpt.objective.ar import AR
from igpt.run.targets import task_settings
from igpt.task import predict
from igpt.training import callbacks, hardware
from igpt.training.callbacks import SampleGrid
from igpt.training.hardware import HardwareConfig
from igpt.training.online_probe import OnlineLinearProbe
from tests.task.conftest import Arrays, Lab, drawn

WATCHED: dict[str, Any] = {"steps": 2, "warmup_steps": 1, "val_every": 2, "batch_size": 20}
ONLINE: dict[str, Any] = {
    "every": 1, "depths": [0.0, 1.0], "train_images": 150, "val_images": 70, "strength": 0.5, "batch_size": 16,
    "norm": "ln_1",
}  # fmt: skip
SAMPLED: dict[str, Any] = {"count": 5, "batch_size": 2, "temperature": 1.0, "top_k": None, "top_p": None}
PREDICTED: dict[str, Any] = {
    "split": "val", "head": None, "batch_size": 10, "eval_masks": None, "count": 1, "mistakes": 0
}  # fmt: skip


def one_image(lab: Lab) -> Lab:
    """The same digits, of which a single one is in val: one of two ranks has none."""
    splits = {name: lab.digits.split(name) for name in ("train", "val")}
    alone = {name: ArraySplit(of.pixels[:1], of.labels[:1]) for name, of in splits.items()}
    return Lab(Arrays(alone), lab.palette)


def predicted(lab: Lab, folder: Path, weights: Weights, probe: Path, on: HardwareConfig) -> Result:
    """`task=predict` by the probe of a run."""
    components = lab.components(folder, weights, on=on)
    vars(components)["classifier"] = find_class_head(weights, str(probe))
    folder.mkdir(parents=True, exist_ok=True)
    return predict.run(components, task_settings("igpt.task.predict.run", PREDICTED))


def loss_of_one(lab: Lab, folder: Path, weights: Weights, on: HardwareConfig) -> float:
    result = one_image(lab).evaluate(folder, weights, on=on, batch_size=10)
    return result.numbers["val/loss_gen"].value


def watched(lab: Lab, folder: Path, on: HardwareConfig) -> dict[str, list[float]]:
    """The curves of probes while a network is trained, which also draws samples."""
    watching = OnlineLinearProbe(**ONLINE), SampleGrid(count=3, every=1, temperature=1.0)
    curves = lab.pretrain(folder, on=on, callbacks=watching, **WATCHED).curves
    return {name: curve.y for name, curve in curves.items() if name.startswith("probe/")}


def count_bytes(net: nn.Module) -> int:
    """Bytes of a network's weights in this process."""
    held = [getattr(weight, "_local_tensor", weight) for weight in net.parameters()]
    return sum(tensor.untyped_storage().nbytes() for tensor in held)


def measure_held(weights: Weights, on: HardwareConfig) -> dict[str, float]:
    """The share of all bytes that this rank holds: once filled, while a block is computed at most, and afterwards."""
    full, shares = sum(tensor.n_byte for tensor in weights.state().values()), list[float]()
    net = on.build_frozen(weights.build_network, weights.load_into)
    answers = {"filled": count_bytes(net) / full}

    def note(*_: Any) -> None:
        shares.append(count_bytes(net.h) / full)

    for block in net.blocks:
        block.mlp.register_forward_hook(note)
    with torch.no_grad(), on.autocast():
        net(torch.zeros(3, net.n_ctx, dtype=torch.int64))
    return {**answers, "of the blocks": max(shares), "afterwards": count_bytes(net) / full}


def read_frozen(lab: Lab, run: Path, place: Path, on: HardwareConfig) -> dict[str, Any]:
    """What reading tasks find with the weights of a run."""
    from tests.task.ranks_work import evaluated

    weights = find_weights(str(run))
    samples = lab.execute("sample", place / "sample", weights, on=on, **SAMPLED).arrays["samples"]
    sgd = lab.probe(place / "sgd", weights, on=on, solver="sgd", sgd={"rates": [1.0, 30.0], "steps": 12}, test=False)
    ranks.barrier()  # until the first has written the probe
    classes = predicted(lab, place / "predict", weights, place / "sgd", on)
    return {
        "evaluated": evaluated(lab, run, on, AR()),
        "sgd": {key: number.value for key, number in sgd.numbers.items() if number.unit == "share"},
        "predicted": {key: number.value for key, number in classes.numbers.items()},
        "confusion": classes.matrices["confusion"].tolist(),
        "one image": loss_of_one(lab, place / "one", weights, on),
        "samples": torch.from_numpy(samples),
    }


def read_features(lab: Lab, place: Path, weights: Weights, on: HardwareConfig) -> dict[str, float]:
    probe = lab.probe(place / "lbfgs", weights, on=on, batch_size=16, test=False)
    return {key: number.value for key, number in probe.numbers.items() if number.unit == "share"}


def draw_without_memory(lab: Lab, place: Path, rank: ranks.Rank, on: HardwareConfig) -> str:
    """The message of a training whose second rank has no memory to draw samples."""
    grid = SampleGrid(count=3, every=1, temperature=1.0)

    def draw(*arguments: Any, **how: Any) -> Tensor:
        if rank.index == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(*arguments, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(callbacks, "generate", draw)
        lab.pretrain(place, on=on, callbacks=(grid,), **WATCHED)
    return str(grid.bystander.error)


def watched_by_zero(lab: Lab, place: Path, rank: ranks.Rank) -> dict[str, Any]:
    """The same under ZeRO 3, on DeepSpeed's CPU accelerator."""
    from tests.task.ranks_work import on_all

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hardware, "DEEPSPEED_RUNS_ON", ("cpu",))
        return watched(lab, place / "watched zero", on_all(strategy="deepspeed_3"))


def work(lab: Lab, place: Path, rank: ranks.Rank) -> dict[str, Any]:
    from tests.task.ranks_work import on_all

    if rank.is_first:
        drawn(place / "drawn", lab.palette, AR())
    ranks.barrier()
    weights, answers = find_weights(str(place / "drawn")), dict[str, Any]()
    fsdp, zero = on_all(strategy="fsdp"), on_all(strategy="deepspeed_3")
    answers["held"] = measure_held(weights, fsdp)
    answers["held in half"] = measure_held(weights, on_all(strategy="fsdp", precision="bf16-mixed"))
    answers["read"] = read_frozen(lab, place / "drawn", place / "frozen", fsdp)
    answers["lbfgs"] = read_features(lab, place / "frozen zero", weights, zero)
    answers["watched"] = watched(lab, place / "watched sharded", fsdp)
    answers["watched whole"] = watched(lab, place / "watched whole", on_all())
    answers["no memory"] = draw_without_memory(lab, place / "no memory", rank, fsdp)
    return {"frozen": answers}
