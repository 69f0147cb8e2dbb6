"""`python -m peftsurgery` is the command line."""

from peftsurgery.cli import main

if __name__ == "__main__":
    main(prog_name="peftsurgery")
