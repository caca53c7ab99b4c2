"""What every test needs: one thread, since the models are tiny and several test processes share the cores."""

import torch

torch.set_num_threads(1)
