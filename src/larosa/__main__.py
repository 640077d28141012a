"""`python -m larosa`: the command line."""

from larosa.cli.main import main

main()
