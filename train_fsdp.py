"""Train a language model with PyTorch FSDP2 + DTensor, on Ray.

python train_fsdp.py --tp_size 2 --dp_size 2
python train_fsdp.py --tp_size 2 --dp_size 2 --offline_demo
"""

import sys

from tp2d_lib import cli

if __name__ == "__main__":
    sys.exit(cli.main("fsdp", __doc__.splitlines()[0]))
