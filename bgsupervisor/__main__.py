"""`python -m bgsupervisor`: the same as the command `bgsupervisor`."""

from bgsupervisor.cli import main

if __name__ == "__main__":
    main()
