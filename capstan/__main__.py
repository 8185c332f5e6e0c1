"""Run the command line: `python -m capstan`."""

from capstan.cluster.cli import main

if __name__ == "__main__":
    main()
