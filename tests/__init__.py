import os


# Ranks compute on one thread, as launchers let them, and sums over several have other roundings.
os.environ["OMP_NUM_THREADS"] = "1"

import torch
from torch.utils.data import _utils


torch.set_num_threads(1)  # where something has imported it before
# Seconds for which a loader waits for a worker to end, each in turn, before it ends it: 5 by default. Those of a loader that
# is collected with its trainer hear nothing of it, since the queues to them are cleared away first.
_utils.MP_STATUS_CHECK_INTERVAL = 0.2
