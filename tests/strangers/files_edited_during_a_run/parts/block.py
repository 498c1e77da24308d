from edgewright.tests.strangers.files_edited_during_a_run.parts import ACTIVATION
from torch import nn


def block():
    return nn.Sequential(nn.Conv2d(3, 8, 3), ACTIVATION(), nn.AdaptiveAvgPool2d(2))
