"""python -m attnserve: the command `attnserve`."""

from attnserve.cli import main

if __name__ == "__main__":
    main()
