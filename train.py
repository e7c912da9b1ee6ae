"""`flashdit train`, as a file that `accelerate launch` takes."""

from flashdit.commands.train import main
from flashdit.shared.command import run_script

if __name__ == "__main__":
    run_script(main)
