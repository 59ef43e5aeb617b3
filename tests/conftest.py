import torch

torch.set_num_threads(1)  # small models: more threads only wait for one another
