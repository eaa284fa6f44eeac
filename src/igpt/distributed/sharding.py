"""Access to weights that may be sharded, by FSDP2 or DeepSpeed."""

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from igpt.distributed import ranks


def copy_into_sharded(weight: Tensor, full: Tensor) -> None:
    """Copies the values of a full weight into it; of a sharded weight, into the local shard.

    Under ZeRO 3 every rank must call it; the values of rank 0 are used.
    """
    if isinstance(weight, DTensor):
        mesh, placements = weight.device_mesh, weight.placements
        weight.copy_(distribute_tensor(full.to(mesh.device_type), mesh, placements, src_data_rank=None))
    elif hasattr(weight, "ds_shape"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([weight], modifier_rank=0):
            if ranks.this_rank().is_first:
                weight.copy_(full)
    else:
        weight.copy_(full)


def gather_weight(weight: Tensor) -> Tensor:
    """The full weight: itself, or a copy of a sharded one. A collective where it is sharded."""
    if isinstance(weight, DTensor):
        return weight.full_tensor()
    if hasattr(weight, "ds_shape"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([weight]):
            return weight.detach().clone()
    return weight


def unsharded_shape(weight: Tensor) -> tuple[int, ...]:
    """The full shape of a weight, also under ZeRO 3."""
    return tuple(getattr(weight, "ds_shape", weight.shape))
