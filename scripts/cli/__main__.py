"""`python -m scripts.cli` is `sluice`."""

from scripts.cli.app import main

if __name__ == "__main__":
    main()
