"""Which data set serves which purpose: images of different seeds share nothing."""

from enum import IntEnum


class Seed(IntEnum):
    """Seeds of the generated data sets."""

    TRAINING = 1
    EVALUATION = 2
    SAMPLES = 3
    TESTS = 4
