"""`python -m fledge` is the command `fledge`."""

from fledge.cli.main import run

if __name__ == "__main__":
    run()
