"""Where a weight lies: whole, or in parts on several processes, of FSDP2 or of DeepSpeed."""

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from igpt.distributed import ranks


def put(weight: Tensor, values: Tensor) -> None:
    """Writes the values of a whole weight into it, or, where it is sharded, into the part that is here.

    Under DeepSpeed's ZeRO 3 every process has to call it; the values are the first one's.
    """
    if isinstance(weight, DTensor):
        mesh, placements = weight.device_mesh, weight.placements
        weight.copy_(distribute_tensor(values.to(mesh.device_type), mesh, placements, src_data_rank=None))
    elif hasattr(weight, "ds_shape"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([weight], modifier_rank=0):
            if ranks.this_rank().first:
                weight.copy_(values)
    else:
        weight.copy_(values)


def whole_shape(weight: Tensor) -> tuple[int, ...]:
    """A weight's shape, also where DeepSpeed's ZeRO 3 has taken it apart."""
    return tuple(getattr(weight, "ds_shape", weight.shape))
