"""``ImageTrainer``: ``PowerGradTrainer`` for image classifiers, with timm's regularisation; a resumed run is exact.

Images come as uint8 and are normalised, mixed and erased on the device; an average of the weights is kept beside the
model; each step's randomness is a function of (seed, step, process), so a killed run resumes as if it had never
stopped.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.data_loader import prepare_data_loader
from safetensors.torch import load_model
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, Mixup
from timm.data.random_erasing import RandomErasing
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler
from transformers import TrainerCallback, TrainerState

from ..data.workers import guard_workers, use_worker_server
from ..functional import IGNORED
from ..images.dataset import ImageDataset, ImageStream
from ..images.device_transforms import augment
from ..images.seeding import seed_step
from ..images.transforms import check_channels, normalize
from ..limits import check_type
from ..runs.record import EMA, WEIGHTS
from .checkpoints import AtomicCheckpoints, temporarily
from .image_arguments import ImageTrainingArguments
from .powergrad import PowerGradTrainer


class ImageTrainer(AtomicCheckpoints, PowerGradTrainer):
    """Trains image classifiers whose data sets yield ``pixel_values``, (3, H, W), uint8 or float, and ``labels``.

    Beside what ``PowerGradTrainer`` does: checkpoints are atomic (``AtomicCheckpoints``); uint8 images are normalised
    on the device, which can also do flips and colour jitter (``ImageTransform(..., on_device=True)``); Mixup, CutMix
    and random erasing are timm's, and PGT is exact with their soft targets; ``label_smoothing_factor`` smooths the
    training targets alone; with ``ema_decay`` each evaluation also reports ``eval_ema_*``, and each checkpoint and the
    final model hold the averaged model in the folder ``ema``.

    Args:
        model: Any classifier of transformers, with ``config.num_labels``; ``pgt_hf.images.create_model`` makes them of
            timm's.
        args: ``ImageTrainingArguments``.
        mean: What uint8 images are normalised with, for pixels in [0, 1]; by default the model's own
            (``config.pretrained_cfg``), or ImageNet's.
        std: As ``mean``.
        class_weights: A factor for each class in the training loss, (C); the loss is divided by the number of images,
            so their mean over the images should be 1.
        **kwargs: As Trainer takes them.

    Example:
        >>> args = ImageTrainingArguments("out", optim="powergrad_sgd", schedule="cosine", mixup=0.2)
        >>> trainer = ImageTrainer(model, args, train_dataset=ImageDataset(train, transform), data_collator=collate)
    """

    args: ImageTrainingArguments
    model: Any
    model_wrapped: Any
    lr_scheduler: Any
    _signature_columns: Any

    def __init__(
        self,
        model: Any,
        args: ImageTrainingArguments,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        class_weights: Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        check_type("args", args, ImageTrainingArguments)
        check_type("model", model, nn.Module)
        classes = getattr(getattr(model, "config", None), "num_labels", None)
        if classes is None:
            raise TypeError(
                f"model must be a classifier of transformers, got a {type(model).__name__}; see create_model"
            )
        check_type("class_weights", class_weights, Tensor, NoneType)
        if class_weights is not None and class_weights.shape != (classes,):
            raise ValueError(f"class_weights must have shape ({classes},), got {tuple(class_weights.shape)}")
        if class_weights is not None and not bool((class_weights >= 0).all() & class_weights.isfinite().all()):
            raise ValueError(f"class_weights must be finite and at least 0, got {class_weights.tolist()}")
        mixing = args.mixup > 0 or args.cutmix > 0
        if mixing and args.per_device_train_batch_size % 2:
            raise ValueError(
                "mixup and cutmix mix the images of a batch in pairs: per_device_train_batch_size must be even, "
                f"got {args.per_device_train_batch_size}"
            )
        if mixing and not args.dataloader_drop_last:
            raise ValueError("mixup and cutmix need dataloader_drop_last=True: a last, odd batch cannot be paired")
        for name, values in (("mean", mean), ("std", std)):
            if values is not None:
                check_channels(name, values)
        use_worker_server(args)
        if args.channels_last:
            model = model.to(memory_format=torch.channels_last)
        super().__init__(model, args, compute_loss_func=self._cross_entropy, **kwargs)
        if args.ema_decay is not None and self.is_fsdp_enabled:
            raise ValueError("ema_decay needs whole parameters on each process, and FSDP shards them: set it to None")
        self.ema: ModelEmaV3 | None = None
        preprocessing = getattr(model.config, "pretrained_cfg", None) or {}
        self._mean = tuple(preprocessing.get("mean") or IMAGENET_DEFAULT_MEAN if mean is None else mean)
        self._std = tuple(preprocessing.get("std") or IMAGENET_DEFAULT_STD if std is None else std)
        self._class_weights = None if class_weights is None else class_weights.float().to(args.device)
        self._mixup: Mixup | None = None
        if mixing:  # one class more, see _mix; the loss smooths the labels
            self._mixup = Mixup(args.mixup, args.cutmix, label_smoothing=0.0, num_classes=classes + 1)
        self._erasing: RandomErasing | None = None
        if args.random_erasing > 0:
            self._erasing = RandomErasing(args.random_erasing, mode="pixel", device=args.device)
        self.add_callback(_Steps(self))

    # --- data

    def get_train_dataloader(self) -> DataLoader[Any]:
        dataset = self.train_dataset
        if not isinstance(dataset, ImageStream):
            return super().get_train_dataloader()
        # A stream gives each process its own part already: Accelerate only moves the batches to the device.
        loader = DataLoader(
            dataset,
            batch_size=self._train_batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            multiprocessing_context=self.args.dataloader_multiprocessing_context,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers and self.args.dataloader_num_workers > 0,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            drop_last=True,
        )
        return prepare_data_loader(
            guard_workers(loader),
            self.accelerator.device,
            num_processes=1,
            process_index=0,
            put_on_device=True,
            dispatch_batches=False,
            non_blocking=self.accelerator.non_blocking,
        )

    def _get_dataloader(self, *args: Any, is_training: bool = False, **kwargs: Any) -> DataLoader[Any]:
        drop_last = self.args.dataloader_drop_last and is_training  # Trainer would leave out images of the evaluation
        with temporarily(self.args, dataloader_drop_last=drop_last):
            return super()._get_dataloader(*args, is_training=is_training, **kwargs)

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[Any] | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if hasattr(dataset, "epoch") and not isinstance(dataset, IterableDataset):
            return _Shuffle(dataset, self.args.data_seed if self.args.data_seed is not None else self.args.seed)
        return super()._get_train_sampler(train_dataset)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if "augmentation" not in self._signature_columns:  # it is used up before the model sees the batch
            self._signature_columns.append("augmentation")

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs = dict(super()._prepare_inputs(inputs))
        images, labels = inputs["pixel_values"], inputs.get("labels")
        if self.args.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        augmentation = inputs.pop("augmentation", None)
        if augmentation is not None:
            images = augment(images, augmentation)
        if images.dtype == torch.uint8 or augmentation is not None:
            images = normalize(images, self._mean, self._std)
        if self.model.training and labels is not None:
            if self._mixup is not None:
                images, labels = _mix(self._mixup, images, labels)
            if self._erasing is not None:
                self._erasing(images)
        inputs["pixel_values"] = images
        if labels is not None:
            inputs["labels"] = labels
        return inputs

    def bad_images(self) -> int:
        """How many images of the training and evaluation data could not be read so far, over all processes."""
        return sum(self._bad_images_of(dataset) for dataset in (self.train_dataset, self.eval_dataset))

    def _bad_images_of(self, dataset: Any) -> int:
        """An image that evens out the batches of an evaluation may have been read by several processes."""
        if isinstance(dataset, ImageDataset):
            found = dataset.bad_rows().to(self.args.device, torch.int32)
            return int((self.accelerator.reduce(found, "sum") > 0).sum())
        count = torch.tensor(getattr(dataset, "bad_images", 0), device=self.args.device)
        return int(self.accelerator.reduce(count, "sum"))

    # --- loss, schedule

    def _cross_entropy(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | None = None) -> Tensor:
        """Mean over the images that could be read, of the whole accumulated global batch in training."""
        logits = outputs["logits"]
        smoothing = self.args.label_smoothing_factor if self.model.training else 0.0
        weight = self._class_weights if self.model.training else None
        if labels.is_floating_point():
            # Not torch's own smoothing: it would spread mass over the row of zeros of an unreadable image.
            labels = labels * (1 - smoothing) + labels.sum(-1, keepdim=True) * (smoothing / labels.size(-1))
            loss = F.cross_entropy(logits, labels, weight, reduction="sum")
        else:
            loss = F.cross_entropy(logits, labels, weight, reduction="sum", label_smoothing=smoothing)
        if num_items_in_batch is None:
            num_items_in_batch = labels.sum() if labels.is_floating_point() else (labels != IGNORED).sum()
        # A batch whose images are all unreadable has a loss of 0.
        return loss / torch.as_tensor(num_items_in_batch, device=loss.device).clamp(min=torch.finfo(loss.dtype).tiny)

    def set_initial_training_values(self, args: Any, dataloader: DataLoader[Any]) -> Any:
        values = super().set_initial_training_values(args, dataloader)
        self._updates_per_epoch = values[1]
        return values

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        if self.args.schedule is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        scheduler, _ = create_scheduler_v2(
            self.optimizer if optimizer is None else optimizer,
            sched="cosine" if self.args.schedule == "cosine" else "multistep",
            num_epochs=num_training_steps / self._updates_per_epoch,
            decay_milestones=self.args.decay_epochs,
            decay_rate=self.args.decay_rate,
            min_lr=self.args.min_lr,
            warmup_lr=self.args.warmup_lr * self.args.learning_rate,
            warmup_epochs=self.args.warmup_epochs,
            step_on_epochs=False,
            updates_per_epoch=self._updates_per_epoch,
        )
        self.lr_scheduler = _PerUpdate(scheduler)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    # --- the averaged model

    def evaluation_loop(
        self, dataloader: DataLoader[Any], description: str, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> Any:
        output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.ema is not None and description == "Evaluation":
            with temporarily(self, model=self.ema.module, model_wrapped=self.ema.module):
                prefix = f"{metric_key_prefix}_{EMA}"
                again = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=prefix, **kwargs)
            output.metrics.update(again.metrics)
        # Trainer repeats a mean loss for each image of a batch, padded ones too; the metrics count images.
        for key in [key for key in output.metrics if key.endswith("_nll")]:
            output.metrics[key.removesuffix("nll") + "loss"] = output.metrics[key]
        return output

    def _save_more(self, folder: Path) -> None:
        if self.ema is not None and self.args.should_save:
            self.ema.module.save_pretrained(folder / EMA)

    def _saved_tensors(self) -> list[Tensor]:
        return super()._saved_tensors() + ([] if self.ema is None else [*self.ema.module.state_dict().values()])

    def _made_with(self) -> dict[str, Any]:
        return super()._made_with() | {"averaged weights (ema_decay)": self.args.ema_decay is not None}

    def _start_ema(self) -> None:
        self.ema = ModelEmaV3(self.model, decay=self.args.ema_decay, use_warmup=self.args.ema_warmup)
        if self._resumed_from is not None:
            self._load_ema(self._resumed_from)

    def use_ema(self) -> None:
        """After training, puts the averaged model, if there is one, in the place of the trained one."""
        if self.ema is not None:
            self.model = self.model_wrapped = self.ema.module
            self.ema = None

    def _load_ema(self, checkpoint: str) -> None:
        assert self.ema is not None
        load_model(self.ema.module, os.path.join(checkpoint, EMA, WEIGHTS))

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.ema is not None:
            self._load_ema(self.state.best_model_checkpoint)


class _Steps(TrainerCallback):
    """Tells the data set the epoch, seeds each step, updates the averaged model."""

    def __init__(self, trainer: ImageTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self.trainer.args.ema_decay is not None:
            self.trainer._start_ema()

    def on_epoch_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        # Accelerate's loader tells the epoch to the data set only if there is no sampler to tell.
        dataset, epoch = self.trainer.train_dataset, int(state.epoch or 0)
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(epoch)
        if isinstance(dataset, ImageStream):
            done = state.global_step % self.trainer._updates_per_epoch * args.gradient_accumulation_steps
            dataset.fast_forward(epoch, done)

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        seed_step(args.seed, state.global_step, args.process_index, args.device)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self.trainer.ema is not None:
            self.trainer.ema.update(self.trainer.model, step=state.global_step)


class _Shuffle(Sampler[int]):
    """A permutation that is a function of (seed, epoch), the epoch being the data set's."""

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[int]:
        yield from np.random.default_rng((self.seed, self.dataset.epoch)).permutation(len(self.dataset)).tolist()


class _PerUpdate:
    """timm's scheduler behind the methods that Trainer calls on torch's."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler = scheduler
        self.updates = 0
        scheduler.step_update(0)

    def step(self) -> None:
        self.updates += 1
        self.scheduler.step_update(self.updates)

    def get_last_lr(self) -> list[float]:
        return [group["lr"] for group in self.scheduler.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        return {"updates": self.updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.updates = state["updates"]
        self.scheduler.step_update(self.updates)


def _mix(mixup: Mixup, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Mixed images and targets, (N, C). An unreadable image counts as one more class, which is then left out."""
    labels = torch.where(labels == IGNORED, mixup.num_classes - 1, labels)
    images, targets = mixup(images, labels)
    return images, targets[:, :-1]
