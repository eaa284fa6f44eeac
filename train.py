"""The only entry point: `python train.py --help`."""

import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from igpt import processes
from igpt.arguments import prepare

CONF = Path(__file__).parent / "conf"
ASKED = sys.argv[1:]


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def main(cfg: DictConfig) -> None:
    n_process = 1 if processes.is_rank() else processes.devices_of(cfg.trainer)
    if n_process > 1:
        hydra_cfg = HydraConfig.get()  # a job of a sweep that is run in this process has arguments of its own
        arguments = hydra_cfg.overrides.task if hydra_cfg.mode == RunMode.MULTIRUN else ASKED
        if code := processes.run_ranks([sys.executable, __file__, *arguments], n_process):
            sys.exit(code)
        return
    from igpt.launch import main as run  # the heavy imports, after Hydra has found nothing wrong

    run(cfg)


if __name__ == "__main__":
    processes.hold_lifeline()
    try:
        sys.argv[1:] = prepare(sys.argv[1:], CONF)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    main()
    sys.exit(processes.sweep_code)
