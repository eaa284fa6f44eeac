"""DeepSpeed strategy: ZeRO stages 2 and 3 under Lightning, with this project's own sharded checkpoints.

DeepSpeed's own checkpoints are unrestricted pickles and load only with the same number of processes. These are
written in the sharded format of `trainer=fsdp`, each rank saving some complete tensors: any number of processes of
either strategy resumes them, and no code in them is executed.
"""

import atexit
import gc
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from lightning.pytorch.strategies.deepspeed import remove_module_hooks
from torch import Tensor, nn
from torch.distributed import HashStore  # type: ignore[attr-defined]  # documented, not listed in its __all__
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import Optimizer

from igpt.checkpoint import sharded
from igpt.checkpoint.tensors import LazyTensor, State
from igpt.checkpoint.training_state import read_training_state
from igpt.distributed import ranks
from igpt.distributed.sharding import copy_into_sharded, unsharded_shape
from igpt.training.cost_estimate import BUCKET
from igpt.training.fsdp import write_folder

INSTALL = "trainer=deepspeed_… needs DeepSpeed, which is not installed here: pip install deepspeed; or trainer=fsdp"
STEP, MOMENTS = "step", ("exp_avg", "exp_avg_sq")  # Adam's state per weight


class ZeRO(DeepSpeedStrategy):
    """DeepSpeed stage 2 (optimiser state and gradients sharded) or 3 (weights, too); `offload`: to host memory.

    Source: Rajbhandari et al. 2020 (ZeRO), Ren et al. 2021 (offload). ZeRO 3 gathers the weights of a module while it
    is called; those that methods such as `GPT.trunk` read, DeepSpeed finds and gathers with the LightningModule.

    Raises:
        ValueError: DeepSpeed is not installed.
    """

    def __init__(self, *, zero_stage: int, offload: bool, n_weight: int) -> None:
        bucket = min(BUCKET, n_weight)  # no larger than the network
        try:
            super().__init__(
                stage=zero_stage,
                offload_optimizer=offload,
                offload_parameters=offload and zero_stage == 3,
                reduce_bucket_size=bucket,
                allgather_bucket_size=bucket,
                logging_batch_size_per_gpu=1,
            )
        except (ImportError, MisconfigurationException) as error:
            raise ValueError(INSTALL) from error
        assert isinstance(self.config, dict)
        self.config["zero_force_ds_cpu_optimizer"] = False  # keep PyTorch's fused Adam

    # Setup: the process group of several ranks exists already, and `HardwareConfig` has checked the device.

    def setup_environment(self) -> None:
        DDPStrategy.setup_environment(self)

    @property
    def root_device(self) -> torch.device:
        device: torch.device = super().root_device
        return device if device.index is not None else torch.device(device.type, 0)  # DeepSpeed needs an index

    def setup_distributed(self) -> None:
        import deepspeed

        if not dist.is_initialized():
            join_alone(self.root_device)
        if self.root_device.type == "cuda" or "LOCAL_RANK" not in os.environ:
            # DeepSpeed takes it for the index of the GPU: srun sets none, and where a rank sees one GPU it is 0
            os.environ["LOCAL_RANK"] = str(self.root_device.index)
        reset_seed()
        self.set_world_ranks()
        deepspeed.init_distributed(auto_mpi_discovery=False)

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Lightning has divided the loss by the accumulation steps already, so DeepSpeed must not."""
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    @property
    def gradient_norm(self) -> float:
        """The norm of the last step's gradient, before it was clipped; it waits for the device."""
        engine: Any = self.model
        norm = engine.get_global_grad_norm()
        return math.nan if norm is None else float(norm)

    def _allocate_moments(self) -> dict[Any, dict[str, Tensor]]:
        """Allocates and returns Adam's state of the local flat partitions, which the first step would create."""
        zero: Any = self.optimizers[0]
        parts = zero.fp32_partitioned_groups_flat if self.zero_stage_3 else zero.single_partition_of_fp32_groups
        state: dict[Any, dict[str, Tensor]] = zero.optimizer.state
        for part in parts:
            empty = {key: torch.zeros_like(part, requires_grad=False) for key in MOMENTS}
            state[part] = {STEP: torch.zeros((), dtype=torch.float32, device=part.device), **empty}
        if not self.zero_stage_3:
            zero._lazy_init_hp_params_optimizer_state()  # maps weights to slices of the partitions
        return state

    # Checkpoints

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """Writes the checkpoint folder atomically: complete float32 tensors, distributed over the ranks."""
        rest = {key: value for key, value in checkpoint.items() if key not in ("state_dict", "optimizer_states")}
        write_folder(Path(filepath), self.checkpoint_io, lambda folder: self._save(folder, rest))

    def _save(self, folder: Path, rest: Mapping[str, Any]) -> None:
        rank = ranks.this_rank()
        zero: Any = self.optimizers[0]
        step = next(iter(zero.optimizer.state.values()))[STEP]
        trained = [name for name, weight in self._named_weights() if weight.requires_grad]
        groups = [{**group, "params": trained} for group in zero.param_groups]
        mine: dict[str, Any] = {"optimizer_0": {"param_groups": groups}} if rank.is_first else {}
        for index, (name, weight) in enumerate(self._named_weights()):
            full_tensor = gather_full(weight)
            moments = {key: gather_full(weight, key) for key in MOMENTS} if weight.requires_grad else {}
            if index % rank.count == rank.index:
                mine[f"{sharded.STATE}{name}"] = full_tensor.cpu()
                if moments:
                    moments[STEP] = torch.as_tensor(step, dtype=torch.float32)
                for key, value in moments.items():
                    mine[f"{sharded.MOMENTS}{name}.{key}"] = value.cpu()
        save(mine, checkpoint_id=folder)
        if rank.is_first:
            torch.save(dict(rest), folder / sharded.REST)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Loads a checkpoint of any strategy, one file or sharded, written by any number of processes."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        path = Path(checkpoint_path)
        (state, rest), moments_by_weight = read_training_state(path), self._allocate_moments()
        steps = set()
        for name, weight in self._named_weights():
            values = _read_tensor(state, f"{sharded.STATE}{name}", path).to(self.root_device)
            with torch.no_grad():
                copy_into_sharded(weight, values)
            if not weight.requires_grad:
                continue
            safe_set_full_fp32_param(weight, values)
            for key in MOMENTS:
                moment = _read_tensor(state, f"{sharded.MOMENTS}{name}.{key}", path)
                safe_set_full_optimizer_state(weight, moment.to(self.root_device), key)
            steps.add(float(_read_tensor(state, f"{sharded.MOMENTS}{name}.{STEP}", path)))
        (step,) = steps
        for part in moments_by_weight.values():
            part[STEP].fill_(step)
        for group, rate in zip(self.optimizers[0].param_groups, rest["lr_schedulers"][0]["_last_lr"], strict=True):
            group["lr"] = rate  # loading a scheduler does not restore the optimiser's current rate
        return rest

    def _named_weights(self) -> list[tuple[str, nn.Parameter]]:
        assert self.lightning_module is not None
        return list(self.lightning_module.named_parameters())


def join_alone(device: torch.device) -> None:
    """Opens a process group of this process alone. It stays, as DeepSpeed keeps it for later trainings."""
    on_gpu = device.type == "cuda"
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        store=HashStore(),
        rank=0,
        world_size=1,
        device_id=device if on_gpu else None,
    )
    atexit.register(dist.destroy_process_group)


def release_training_state(module: L.LightningModule) -> None:
    """Frees the weights, gradients and optimiser state of a training that has ended; the module's figures stay."""
    remove_module_hooks(module)  # DeepSpeed's
    for name, child in list(module.named_children()):
        if next(child.parameters(), None) is not None:
            setattr(module, name, None)
    if (data := getattr(module.trainer, "datamodule", None)) is not None:
        data.trainer = None
    module.trainer = None  # which holds strategy and optimiser
    if torch.cuda.is_available():
        gc.collect()  # they refer to each other, and a GPU's memory is needed at once


def gather_full(weight: nn.Parameter, moment: str | None = None) -> Tensor:
    """A complete weight, or one of its Adam moments, in float32. A collective: every rank must call it."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if not weight.requires_grad:  # the optimiser has no float32 copy of it
        with deepspeed.zero.GatheredParameters([weight]):
            return weight.detach().float().clone()
    tensor = safe_get_full_fp32_param(weight) if moment is None else safe_get_full_optimizer_state(weight, moment)
    assert isinstance(tensor, Tensor), moment
    return tensor.detach().float().reshape(unsharded_shape(weight))


def full_state(net: nn.Module) -> State:
    """The weights of a network sharded by DeepSpeed, each gathered when read. A collective: all ranks must read."""

    def one(weight: nn.Parameter) -> LazyTensor:
        return LazyTensor(unsharded_shape(weight), torch.float32, lambda: gather_full(weight).cpu())

    return {name: one(weight) for name, weight in net.named_parameters()}


def _read_tensor(state: State, name: str, path: Path) -> Tensor:
    if name not in state:
        raise ValueError(f"{path} holds no {name}: it is of another network, or damaged")
    return state[name].read()
