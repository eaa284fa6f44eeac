"""The only entry point: `python train.py --help`."""

import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from igpt.distributed import launcher
from igpt.run.arguments import prepare_arguments

CONF = Path(__file__).parent / "conf"
ASKED = sys.argv[1:]


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def main(cfg: DictConfig) -> None:
    n_process = 1 if launcher.is_rank() else launcher.count_devices(cfg.trainer)
    if n_process > 1:
        hydra_cfg = HydraConfig.get()  # of a sweep's job in this process, the arguments are Hydra's
        arguments = hydra_cfg.overrides.task if hydra_cfg.mode == RunMode.MULTIRUN else ASKED
        if code := launcher.run_ranks([sys.executable, __file__, *arguments], n_process):
            sys.exit(code)
        return
    from igpt.run.launch import main as run  # slow imports, after Hydra has composed the config

    run(cfg)


if __name__ == "__main__":
    launcher.die_with_parent()
    try:
        sys.argv[1:] = prepare_arguments(sys.argv[1:], CONF)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    main()
    sys.exit(launcher.sweep_code)
