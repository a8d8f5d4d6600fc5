"""A classifier's predictions on an evaluation set: confusion, calibration and worst mistakes."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..functional import IGNORED
from ..images.dataset import thumbnail
from ..images.transforms import collate, normalize
from ..limits import Count, NonNegative, Whole, check_type, checked
from .calibration import Calibration, best_calibrated, compare_calibration, scaled_logits
from .confusion import confusion_matrix, worst_mistakes
from .metrics import Reliability

_THUMBNAIL = 112  # pixels


@dataclass(frozen=True)
class Mistake:
    """An image that was classified wrong, and the probability of the wrong class; ``picture`` is a data URL."""

    index: int
    label: int
    predicted: int
    confidence: float
    picture: str | None = None


@dataclass(frozen=True)
class Evaluation:
    """What the report shows of a model's predictions.

    ``confusion`` comes from ``confusion_matrix``, ``calibration`` from ``compare_calibration``. ``mistakes`` are the
    most confident wrong predictions, by the best calibrated probabilities.
    """

    names: list[str]
    confusion: NDArray[np.int64]
    calibration: dict[str, Calibration]
    mistakes: list[Mistake]

    @classmethod
    @checked
    def from_logits(
        cls,
        logits: Tensor,
        labels: Tensor,
        names: Sequence[str],
        dataset: Any = None,
        *,
        alpha: float | None = None,
        mistakes: Annotated[int, Whole("[0, inf)")] = 24,
    ) -> "Evaluation":
        """From the logits of an evaluation: of the images, only the mistakes are read.

        Args:
            logits: Of shape (N, C), in the order of the data set.
            labels: Of shape (N); -100 are left out.
            names: Of the classes.
            dataset: An ``ImageDataset``, whose ``split`` has the pictures of the mistakes.
            alpha: As for ``examine``.
            mistakes: How many of the worst are kept.

        Example:
            >>> metrics = ClassificationMetrics(alpha=0.25, keep_logits=True)
            >>> trainer = ImageTrainer(
            ...     model, args, compute_metrics=metrics, preprocess_logits_for_metrics=metrics.preprocess
            ... )
            >>> results = trainer.evaluate(validation)  # over all processes and workers
            >>> evaluation = Evaluation.from_logits(*metrics.kept, class_names(split), validation, alpha=0.25)
        """
        if not (labels != IGNORED).any():
            raise ValueError("the data set holds no labelled image to examine")
        calibration = compare_calibration(logits, labels, alpha)
        temperature = calibration[best_calibrated(calibration)].temperature
        sure, predicted = (found.numpy() for found in torch.softmax(logits / temperature, -1).max(-1))
        worst = worst_mistakes(labels, predicted, sure, mistakes)
        return cls(
            list(names),
            confusion_matrix(labels, predicted, len(names)),
            calibration,
            [Mistake(i, int(labels[i]), int(predicted[i]), float(sure[i]), _thumbnail(dataset, i)) for i in worst],
        )

    @property
    def probabilities(self) -> str:
        """The best calibrated ones, such as ``fitted: softmax(z / 1.3)``."""
        best = best_calibrated(self.calibration)
        return f"{best}: softmax({scaled_logits(self.calibration[best].temperature)})"

    def folded(self, alpha: float) -> "Evaluation":
        """That of the same model with alpha multiplied into its head: its logits are ``alpha`` times as large."""
        raw = self.calibration.get("folded", self.calibration["raw"])
        calibration = {"raw": replace(raw, temperatures=(1.0,))}
        if fitted := self.calibration.get("fitted"):
            temperatures = tuple(temperature * alpha for temperature in fitted.temperatures)
            calibration["fitted"] = replace(fitted, temperatures=temperatures)
        return replace(self, calibration=calibration)

    def fitted(self) -> dict[str, float]:
        """The fitted temperature and its scores, as ``metrics.json`` names them; empty if none was fitted."""
        if (found := self.calibration.get("fitted")) is None:
            return {}
        return {"temperature": found.temperature, "nll_fitted": found.nll, "ece_fitted": found.ece}

    def to_json(self) -> dict[str, Any]:
        """JSON values for ``from_json``."""
        rows, columns = self.confusion.nonzero()
        counts = self.confusion[rows, columns]
        return {
            "names": self.names,
            "confusion": np.stack([rows, columns, counts], axis=1).tolist(),
            "calibration": {
                name: asdict(found)
                | {"confidence": None}  # of each image: too much to keep
                | {"reliability": {k: np.nan_to_num(v).tolist() for k, v in asdict(found.reliability).items()}}
                for name, found in self.calibration.items()
            },
            "mistakes": [asdict(mistake) for mistake in self.mistakes],
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Evaluation":
        """From what ``to_json`` gave."""
        classes = len(content["names"])
        confusion = np.zeros((classes, classes), dtype=np.int64)
        for row, column, count in content["confusion"]:
            confusion[row, column] = count
        calibration = {}
        for name, kept in content["calibration"].items():
            diagram = Reliability(**{key: np.asarray(values) for key, values in kept["reliability"].items()})
            more = {"temperatures": tuple(kept["temperatures"]), "confidence": np.empty(0, np.float32)}
            calibration[name] = Calibration(**kept | more | {"reliability": diagram})
        return cls(content["names"], confusion, calibration, [Mistake(**entry) for entry in content["mistakes"]])


@checked
def examine(
    model: Any,
    dataset: Any,
    *,
    alpha: NonNegative | None = None,
    mistakes: Annotated[int, Whole("[0, inf)")] = 24,
    max_images: Count | None = None,
    batch_size: Count = 64,
) -> Evaluation:
    """Runs a classifier over an evaluation set once, in one process, and keeps what the report needs.

    Args:
        model: A transformers image classifier, on the device to use.
        dataset: An ``ImageDataset``: ``pixel_values`` and ``labels``; its ``split`` has the pictures of the mistakes.
        alpha: The alpha of the training, for the folded probabilities ``softmax(alpha z)``; None if it is folded in.
        mistakes: How many of the worst are kept.
        max_images: Look at the first so many images only.
        batch_size: Images at a time.

    Example:
        >>> write_evaluation("runs/digits", examine(model, validation, alpha=0.25))
    """
    check_type("model", model, nn.Module)
    if not hasattr(dataset, "__getitem__") or not len(dataset) or not isinstance(dataset[0], Mapping):
        raise TypeError(f"dataset must hold pixel_values and labels, such as an ImageDataset, got {dataset!r}")
    size = len(dataset) if max_images is None else min(max_images, len(dataset))
    loader = DataLoader(torch.utils.data.Subset(dataset, range(size)), int(batch_size), collate_fn=collate)
    device, was_training = next(model.parameters()).device, model.training
    labels, seen = [], []
    model.eval()
    for batch in tqdm(loader, desc="Looking at the predictions", disable=None, leave=False):
        images = batch["pixel_values"].to(device)
        if images.dtype == torch.uint8:
            images = normalize(images, dataset.reader.transform.mean, dataset.reader.transform.std)
        with torch.no_grad():
            seen.append(model(pixel_values=images).logits.float().cpu())
        labels.append(batch["labels"])
    model.train(was_training)

    names = [model.config.id2label[number] for number in range(len(model.config.id2label))]
    return Evaluation.from_logits(torch.cat(seen), torch.cat(labels), names, dataset, alpha=alpha, mistakes=mistakes)


def _thumbnail(dataset: Any, index: int) -> str | None:
    """A small copy of the image in the data set, if there is one."""
    split = getattr(dataset, "split", None)
    if split is None or (image := thumbnail(split, index, _THUMBNAIL)) is None:
        return None
    if max(image.size) < _THUMBNAIL // 2:  # digits of 8 pixels: as they are, not smeared over a hundred
        factor = _THUMBNAIL // max(image.size)
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
