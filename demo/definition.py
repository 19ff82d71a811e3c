"""What one demo differs in from another: its images, its classifier and its flags; and the classifier's scores."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.base import BaseEstimator, clone

from evaluation.feature_sums import FeatureStatistics
from evaluation.metrics import fid

TORCHRUN = "torchrun --standalone --nproc_per_node=2"


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Images, classifier and flags of a demo. `name` is its preset's in configs/, and that of its images' folder."""

    name: str
    folder: str  # below --output_dir
    pictures: Sequence[str]  # the files that it writes to --pictures
    write_images: Callable[[Path], Mapping[str, int]]  # root -> root/{train,val}/<class>/*.png; images of each part
    features: Callable[[Path], np.ndarray]  # image file -> (F,), what the classifier sees
    estimator: BaseEstimator  # the classifier, unfitted; decision_function gives one margin per pair of classes
    img_size: int  # pixels
    vae: str  # flags of main_vae.py
    vae_launcher: str = "python"  # or TORCHRUN
    quantizers: str  # flags of reconstruction.py
    sampling: Mapping[str, float | str]  # options of the sampler
    sizes: Mapping[str, int]  # vae_steps, steps, samples, reconstructed (held-out images)
    expected: Mapping[str, str]  # stage -> its result on a healthy run

    def fit_classifier(self, train_root: Path) -> "Classifier":
        """The classifier of real images root/<class>/*.png."""
        return Classifier(self.features, clone(self.estimator), train_root)


class Classifier:
    """A classifier fitted on root/<class>/*.png. Labels are class numbers, in the order of the names."""

    def __init__(self, features: Callable[[Path], np.ndarray], estimator: BaseEstimator, train_root: Path):
        files, labels = list_images(train_root)
        self.features, real = features, np.stack([features(file) for file in files])  # (N, F)
        self.estimator = estimator.fit(real, labels)
        self.real_margins = self.margins(real)

    def margins(self, x: np.ndarray) -> np.ndarray:
        """The margin of each pair of classes: (N, F) -> (N, K(K-1)/2)."""
        return self.estimator.decision_function(x)

    def score(self, files: Sequence[Path], labels: Sequence[int]) -> tuple[float, float]:
        """Class accuracy of image files, and the Fréchet distance of their margins to those of the training images."""
        x = np.stack([self.features(file) for file in files])  # (N, F)
        accuracy = float((self.estimator.predict(x) == np.asarray(labels)).mean())
        return accuracy, frechet(self.margins(x), self.real_margins)


def list_images(root: Path) -> tuple[list[Path], list[int]]:
    """The files root/<class>/*.png, sorted, and their class numbers."""
    files = sorted(Path(root).glob("*/*.png"))
    names = sorted({file.parent.name for file in files})
    return files, [names.index(file.parent.name) for file in files]


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """Fréchet distance of two sets of features (N, F)."""
    both = [FeatureStatistics(x.shape[1]) for x in (a, b)]
    for part, x in zip(both, (a, b), strict=True):
        part.update(torch.from_numpy(x))
    return fid(*(part.as_dict() for part in both))
