"""The parts of a data set."""

SPLITS = ("train", "val", "test")
