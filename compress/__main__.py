"""`python -m compress` is `lightcap`."""

from compress.cli import main

if __name__ == "__main__":
    main()
