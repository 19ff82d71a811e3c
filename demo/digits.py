"""The demo's data and classifier: scikit-learn's handwritten digits as an image folder, and an SVM trained on them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC

from dataset.images import atomic_write, read_image

SIZE = 32  # pixels; load_digits is 8x8
VAL_SHARE = 0.1


def split() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{"train" | "val": (images (N, 8, 8) in [0, 16], labels (N,))}: the 1,797 digits in a fixed stratified split."""
    data = load_digits()
    options = dict(test_size=VAL_SHARE, stratify=data.target, random_state=0)
    train_x, val_x, train_y, val_y = train_test_split(data.images, data.target, **options)
    return {"train": (train_x, train_y), "val": (val_x, val_y)}


def write_image_folder(root: str | Path) -> dict[str, int]:
    """Write root/{train,val}/<digit>/<number>.png, 32x32 RGB, bicubic; returns the number of images of each part."""
    parts = split()
    for part, (images, labels) in parts.items():
        for number, (pixels, label) in enumerate(zip(images, labels, strict=True)):
            image = Image.fromarray(np.round(pixels * (255 / 16)).astype(np.uint8))
            image = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC).convert("RGB")
            atomic_write(image, Path(root) / part / str(label) / f"{number:04d}.png")
    return {part: len(labels) for part, (_, labels) in parts.items()}


def features(path: str | Path) -> np.ndarray:
    """An image file as the classifier sees it: grey, box-averaged to 8x8, in [0, 16], (64,)."""
    small = read_image(path).convert("L").resize((8, 8), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float64).ravel() * (16 / 255)


def read_part(root: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Features (N, 64) and labels (N,) of root/<digit>/*.png."""
    files = sorted(Path(root).glob("*/*.png"))
    return np.stack([features(f) for f in files]), np.array([int(f.parent.name) for f in files])


def fit_classifier(train_root: str | Path) -> SVC:
    """A support vector machine (RBF) on the real training digits."""
    return SVC(gamma=0.001, C=10).fit(*read_part(train_root))


def accuracy(classifier: SVC, files: Sequence[Path], labels: Sequence[int]) -> float:
    """Class accuracy: share of the image files that are classified as their label."""
    return float((classifier.predict(np.stack([features(f) for f in files])) == np.array(labels)).mean())
