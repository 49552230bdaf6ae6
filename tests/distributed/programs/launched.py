"""One rank of the command line, as a launcher starts it; the last line is JSON for the harness."""

import sys

from rlhf_dist.cli.main import main

main(["--local_rank=0", *sys.argv[1:]])
print("{}")
