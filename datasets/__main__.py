"""List the data sets below a data root: python -m datasets DATA_ROOT (default: data).

stdout: name, pixels or -, folder, separated by tabs. stderr: the missing ones, with their address.
"""

import sys

from datasets import describe_missing, find_all

data_root = sys.argv[1] if len(sys.argv) > 1 else "data"
for name, (folder, size) in find_all(data_root).items():
    print(name, size or "-", folder, sep="\t")
print(*describe_missing(data_root), sep="\n", file=sys.stderr)
