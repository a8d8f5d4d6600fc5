"""A small ImageTrainer on random images, for the tests of this folder."""

from pathlib import Path

import torch

from pgt_hf import ImageTrainer, ImageTrainingArguments
from pgt_hf.images import create_model

ALPHA, CLASSES, SIDE = 0.25, 10, 32


class Images(torch.utils.data.Dataset):
    """Random uint8 images that change with the epoch, as augmented ones do."""

    def __init__(self, count: int = 40, bad: tuple[int, ...] = ()) -> None:
        self.count, self.bad, self.epoch = count, bad, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        generator = torch.Generator().manual_seed(1000 * self.epoch + index)
        pixels = torch.randint(256, (3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
        return {"pixel_values": pixels, "labels": -100 if index in self.bad else index % CLASSES}


class Validation(Images):
    """The same images at every epoch: Accelerate's loader counts its passes as epochs."""

    def set_epoch(self, epoch: int) -> None:
        pass


def build(folder: Path, *, data: Images | None = None, callbacks: tuple = (), model: dict | None = None, **settings):
    torch.manual_seed(0)
    options = {"norm_free": True} if model is None else model
    network = create_model("resnet10t", [str(i) for i in range(CLASSES)], image_size=SIDE, **options)
    defaults = {
        "alpha": ALPHA,
        "optim": "powergrad_sgd",
        "optim_args": "momentum=0.9,nesterov=true",
        "learning_rate": 0.01,
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": 8,
        "dataloader_drop_last": True,
        "num_train_epochs": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    args = ImageTrainingArguments(str(folder), **defaults | settings)
    images = Images() if data is None else data
    return ImageTrainer(network, args, train_dataset=images, eval_dataset=Validation(20), callbacks=list(callbacks))


def weights(trainer: ImageTrainer) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in trainer.model.state_dict().items()}


# What may happen to a file.
DAMAGE = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-7]),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "one bit flipped": lambda path: path.write_bytes(
        path.read_bytes()[:-9] + bytes([path.read_bytes()[-9] ^ 1]) + path.read_bytes()[-8:]
    ),
}
