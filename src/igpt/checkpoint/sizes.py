"""Names of the paper's networks, for weights without a name."""

from igpt.model.config import GPTConfig

# Blocks and width (Chen et al. 2020, Table 1); `conf/model/` has the same.
NAMES = {(24, 512): "igpt_s", (36, 1024): "igpt_m", (48, 1536): "igpt_l", (60, 3072): "igpt_xl"}


def size_name(network: GPTConfig) -> str:
    """`igpt_s` for 24 blocks of width 512, …; other sizes by both numbers: `igpt_12x256`."""
    size = (network.n_layer, network.n_embd)
    return NAMES.get(size, f"igpt_{size[0]}x{size[1]}")
