from torch import nn

ACTIVATION = nn.ReLU
