"""The entry point of a clone: `python train.py --help`."""

from igpt.cli import main

if __name__ == "__main__":
    main()
