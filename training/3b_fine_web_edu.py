"""Pretrain the 3B model on FineWeb-Edu: `mythos train mythos-3b-fineweb-edu`, under the published command.

python training/3b_fine_web_edu.py, or torchrun --nproc_per_node=8 training/3b_fine_web_edu.py; both take the options of
`mythos train`, such as --data.paths FOLDER.
"""

import sys

from open_mythos.cli import main

RECIPE = "mythos-3b-fineweb-edu"

if __name__ == "__main__":
    sys.exit(main(["train", RECIPE, "--out", f"runs/{RECIPE}", *sys.argv[1:]]))
