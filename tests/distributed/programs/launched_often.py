"""One rank of several runs of the command line, one after another in the same process, each in a process group of its own.

usage: launched_often.py VERB (CONFIG PORT)...
"""

import os
import sys

from rlhf_dist.cli.main import main

place = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")}
verb, *rest = sys.argv[1:]
for config, port in zip(rest[::2], rest[1::2], strict=True):
    os.environ.update(place | {"MASTER_PORT": port})  # a run forgets them at its end
    main([verb, "--config", config])
print("{}")
