"""`python -m peftsurgery` and the `peftsurgery` program: the command line in its own process."""

import atexit
import gc

FEW_COLLECTIONS = (50_000, 20, 100)  # gc.set_threshold


def run() -> None:
    """Run the command line and exit.

    Importing torch makes half a million objects that stay until the end. Collecting while they are
    made finds nothing, and the interpreter's last collection would walk all of them for half a
    second.
    """
    from peftsurgery.cli import main

    gc.set_threshold(*FEW_COLLECTIONS)
    atexit.register(gc.freeze)
    main(prog_name="peftsurgery")


if __name__ == "__main__":
    run()
