"""Handwritten digits, 1,797 grey images of 8x8: they ship with scikit-learn, so nothing is downloaded."""

from dataclasses import dataclass

import numpy as np
import torch

from natgrad_lab.data.images import Images, Source, Splits, stratified


@dataclass(frozen=True)
class Digits(Source):
    """scikit-learn's digits, split once and for all into 1,437 for training and 360 for the test."""

    split_seed: int = 0
    """Seed of the stratified split; changing it changes which images are the test."""

    def shape(self) -> tuple[int, int, int]:
        return (1, 8, 8)

    def classes(self) -> int:
        return 10

    def load(self) -> Splits:
        from sklearn.datasets import load_digits  # here: the import alone takes two seconds

        pixels, target = load_digits(return_X_y=True)
        raw = torch.from_numpy(np.asarray(pixels, dtype=np.uint8)).view(-1, 1, 8, 8)
        labels = torch.from_numpy(np.asarray(target, dtype=np.int64))
        everything = Images(raw, labels, classes=10, mean=(4.88,), std=(6.02,))
        kept, held = stratified(labels, 360 / 1797, self.split_seed)
        return Splits(everything.take(kept), everything.take(held))
