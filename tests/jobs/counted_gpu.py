"""Find pairs on a cluster that counts a GPU: `python -m tests.jobs.counted_gpu '{"source": …}'`.

There need be none: the FAISS of this machine may be the one for CPUs, which search in its stead.
"""

import jobs  # noqa: F401 isort: skip (sets Ray's authentication mode, which Ray reads when it is imported)

import sys

import ray

from jobs.bitext import BitextConfig, bitext
from jobs.runtime import MIN_LOCAL_CPUS, quiet, require_token

if __name__ == "__main__":
    require_token()
    quiet()
    ray.init("local", num_cpus=MIN_LOCAL_CPUS, num_gpus=1, include_dashboard=False, logging_level="WARNING")
    bitext(BitextConfig.model_validate_json(sys.argv[1]))
