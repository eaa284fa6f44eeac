"""`python -m igpt`: the command `igpt`, also where its script is not on the PATH."""

from igpt.cli import main

main()
