"""What `accelerate launch -m pipeline.stages.train.worker worker.json` starts in every process of a training.

It joins two rooms that do not know each other: training, and what judges the answers that a student gives meanwhile.
"""

import sys
from functools import partial

from pipeline.student.process import run_as_worker
from pipeline.student.worker import main
from pipeline.text.verifiers import VERIFIERS

if __name__ == "__main__":
    run_as_worker(partial(main, judges=VERIFIERS), sys.argv)
