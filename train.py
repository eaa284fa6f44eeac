"""The only entry point: `python train.py --help`."""

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig

from igpt.arguments import prepare

CONF = Path(__file__).parent / "conf"


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
def main(cfg: DictConfig) -> None:
    from igpt.launch import main as run  # the heavy imports, after Hydra has found nothing wrong

    run(cfg)


if __name__ == "__main__":
    try:
        sys.argv[1:] = prepare(sys.argv[1:], CONF)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    main()
