"""A classifier's predictions on an evaluation set: confusion, calibration and worst mistakes."""

import base64
import io
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..images.dataset import read_image
from ..images.decoding import BadImageError, read_upright
from ..images.transforms import collate, normalize
from ..limits import Count, NonNegative, Whole, checked
from ..splits import IGNORED
from .confusion import confusion_matrix, worst_mistakes
from .metrics import Reliability, reliability

_THUMBNAIL = 112


@dataclass(frozen=True)
class Mistake:
    """An image that was classified wrong, with the probability of the wrong class; ``picture`` is a data URL."""

    index: int
    label: int
    predicted: int
    confidence: float
    picture: str | None = None


@dataclass(frozen=True)
class Evaluation:
    """What the report shows of a model's predictions.

    ``confusion`` is that of ``confusion_matrix``; ``calibration`` has the reliability of ``softmax(z)`` and, unless
    alpha is 1, of ``softmax(alpha z)``; ``mistakes`` are the most confident wrong predictions.
    """

    names: list[str]
    confusion: NDArray[np.int64]
    calibration: dict[str, Reliability]
    mistakes: list[Mistake]

    def to_json(self) -> dict[str, Any]:
        """JSON values, from which ``from_json`` makes it anew."""
        rows, columns = self.confusion.nonzero()
        counts = self.confusion[rows, columns]
        return {
            "names": self.names,
            "confusion": np.stack([rows, columns, counts], axis=1).tolist(),
            "calibration": {
                name: {key: np.nan_to_num(value).tolist() for key, value in asdict(diagram).items()}
                for name, diagram in self.calibration.items()
            },
            "mistakes": [asdict(mistake) for mistake in self.mistakes],
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Evaluation":
        """What ``to_json`` gave."""
        classes = len(content["names"])
        confusion = np.zeros((classes, classes), dtype=np.int64)
        for row, column, count in content["confusion"]:
            confusion[row, column] = count
        calibration = {
            name: Reliability(**{key: np.asarray(values) for key, values in diagram.items()})
            for name, diagram in content["calibration"].items()
        }
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
        alpha: The alpha of the training, for the probabilities ``softmax(alpha z)``.
        mistakes: How many of the worst are kept.
        max_images: Look at the first so many images only.
        batch_size: Images at a time.

    Example:
        >>> write_evaluation("runs/digits", examine(model, validation, alpha=0.25))
    """
    size = len(dataset) if max_images is None else min(max_images, len(dataset))
    loader = DataLoader(torch.utils.data.Subset(dataset, range(size)), batch_size, collate_fn=collate)
    scales = {"softmax(z)": 1.0} | ({} if alpha in (None, 1) else {f"softmax({alpha:g} z)": float(alpha or 0)})
    device, was_training = next(model.parameters()).device, model.training
    labels, best = [], []
    sure: dict[str, list[torch.Tensor]] = {name: [] for name in scales}
    model.eval()
    for batch in tqdm(loader, desc="Looking at the predictions", disable=None):
        images = batch["pixel_values"].to(device)
        if images.dtype == torch.uint8:
            images = normalize(images, dataset.reader.transform.mean, dataset.reader.transform.std)
        with torch.no_grad():
            logits = model(pixel_values=images).logits.float()
        labels.append(batch["labels"])
        best.append(logits.argmax(-1).cpu())
        for name, scale in scales.items():
            sure[name].append(torch.softmax(scale * logits, -1).amax(-1).cpu())
    model.train(was_training)

    truth, predicted = torch.cat(labels).numpy(), torch.cat(best).numpy()
    counted = truth != IGNORED
    if not counted.any():
        raise ValueError("the data set holds no labelled image to examine")
    names = [model.config.id2label[number] for number in range(len(model.config.id2label))]
    confidence = {name: torch.cat(values).numpy() for name, values in sure.items()}
    shown = confidence[list(scales)[-1]]  # the probabilities that training fitted
    hits = truth[counted] == predicted[counted]
    return Evaluation(
        names,
        confusion_matrix(truth, predicted, len(names)),
        {name: reliability(values[counted], hits) for name, values in confidence.items()},
        [
            Mistake(i, int(truth[i]), int(predicted[i]), float(shown[i]), _thumbnail(dataset, i))
            for i in worst_mistakes(truth, predicted, shown, mistakes)
        ],
    )


def _thumbnail(dataset: Any, index: int) -> str | None:
    """A small copy of the image in the data set, if there is one."""
    split = getattr(dataset, "split", None)
    if split is None or "image" not in split.column_names:
        return None
    try:
        image = read_upright(read_image(split[index]["image"]))
    except (BadImageError, FileNotFoundError):
        return None
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    if max(image.size) < _THUMBNAIL // 2:  # digits of 8 pixels: as they are, not smeared over a hundred
        factor = _THUMBNAIL // max(image.size)
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
