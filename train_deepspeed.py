"""Train a language model with DeepSpeed AutoTP, on Ray.

python train_deepspeed.py --tp_size 2 --dp_size 2 --zero_stage 1
python train_deepspeed.py --tp_size 2 --dp_size 2 --offline_demo
"""

import sys

from tp2d_lib import cli

if __name__ == "__main__":
    sys.exit(cli.main("autotp", __doc__.splitlines()[0]))
