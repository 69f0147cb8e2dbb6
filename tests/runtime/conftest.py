"""One thread: the runtime's tests run many small models, two workers at a time."""

import torch

torch.set_num_threads(1)
