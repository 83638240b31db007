"""Train a language model with PyTorch FSDP2 + DTensor, on Ray.

python train_fsdp.py --tp_size 2 --dp_size 2
python train_fsdp.py --tp_size 2 --dp_size 2 --offline_demo
"""

import signal
import sys

if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # imports end without a traceback
    from tp2d_lib import cli

    sys.exit(cli.main("fsdp", __doc__.splitlines()[0]))
