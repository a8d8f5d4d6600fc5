"""A tiny network, its data and its arguments, for tests that train with Trainer."""

import torch
import transformers
from transformers import TrainingArguments

from pgt_hf import PowerGradTrainingArguments

ALPHA = 0.25
LR = 0.05


class Data(torch.utils.data.Dataset):
    def __init__(self, n=32):
        generator = torch.Generator().manual_seed(5)
        self.images = torch.randn(n, 3, 32, 32, generator=generator)
        self.labels = torch.randint(4, (n,), generator=generator)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return {"pixel_values": self.images[i], "labels": self.labels[i]}


def wrapper(**options):
    torch.manual_seed(0)
    config = transformers.TimmWrapperConfig(architecture="vit_tiny_patch16_224", num_labels=4, model_args={
        "img_size": 32, "depth": 1, "embed_dim": 16, "num_heads": 2, "qkv_bias": False, **options})  # fmt: skip
    return transformers.TimmWrapperForImageClassification(config)


def arguments(path, ours=False, **options):
    defaults = {
        "per_device_train_batch_size": 8, "num_train_epochs": 2, "learning_rate": LR, "lr_scheduler_type": "constant",
        "report_to": "none", "logging_steps": 1, "save_strategy": "no", "use_cpu": True, "max_grad_norm": 0.0,
        "disable_tqdm": True, "remove_unused_columns": False, "dataloader_num_workers": 0, "weight_decay": 0.0,
    }  # fmt: skip
    if ours:
        return PowerGradTrainingArguments(str(path), **defaults | {"alpha": ALPHA} | options)
    options = {"optim": "powergrad_sgd", "optim_args": f"alpha={ALPHA},momentum=0.9,nesterov=true"} | options
    return TrainingArguments(str(path), **defaults | options)


def weights(model):
    return [p.detach().clone() for p in model.parameters()]
