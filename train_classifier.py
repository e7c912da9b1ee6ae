"""`iwin classify`, as a file that `accelerate launch` takes."""

from flashdit.shared.command import run_script
from iwin_tasks.commands.classify import main

if __name__ == "__main__":
    run_script(main)
