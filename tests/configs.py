"""Parts of runs from `conf/`, and the weights of a small network."""

from pathlib import Path

import numpy as np
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from igpt.checkpoint.igpt_format import CheckpointMetadata, save_model
from igpt.run.components import Components
from igpt.run.run_config import RunConfig
from igpt.tokens.palette import Palette
from igpt.tokens.palette_tokenizer import PaletteTokenizer
from igpt.tokens.pixel_order import PixelOrder
from tests.conftest import small_net

CONF = Path(__file__).parents[1] / "conf"


def built(*overrides: str) -> Components:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", overrides=list(overrides), return_hydra_config=True)
        choices = dict(cfg.hydra.runtime.choices)
        cfg = OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key != "hydra"])
        return Components(RunConfig(cfg, choices))


def save_small(
    folder: Path,
    *,
    n_ctx: int = 64,
    permutation: list[int] | None = None,
    causal: bool = True,
) -> Path:
    """A saved network with 17 grey levels, as the digits have."""
    net = small_net(n_ctx=n_ctx, n_vocab=17, causal=causal)
    grey = (np.rint(np.arange(17) * 255 / 16) / 127.5 - 1).astype(np.float32)
    palette = Palette(np.repeat(grey[:, None], 3, axis=1))
    order = PixelOrder(round(n_ctx**0.5), tuple(permutation or range(n_ctx)))
    metadata = CheckpointMetadata(
        network=net.config,
        tokenizer=PaletteTokenizer(palette, order),
        objective={"name": "ar"} if causal else {"name": "bert", "mask_probability": 0.15},
        model="small",
        data="toy",
        step=1,
        seed=0,
    )
    save_model(folder / "model", net.state_dict(), metadata)
    return folder
