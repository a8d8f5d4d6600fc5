"""A plain Accelerate loop on scikit-learn's digits. PGT is the three lines marked ``PGT``; all others are any loop's.

accelerate launch recipes/minimal.py
"""

import argparse

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from pgt_hf import create_optimizer, fold_powergrad  # PGT 1. plain: from timm.optim import create_optimizer_v2
from pgt_hf.images import ImageDataset, ImageTransform, collate, load_image_dataset

EPOCHS, BATCH, LR = 5, 64, 0.05


def main() -> None:
    argparse.ArgumentParser(description=__doc__, allow_abbrev=False).parse_args()  # it takes no arguments
    set_seed(0)
    accelerator = Accelerator()

    digits = load_image_dataset("digits")
    size = {"input_size": (3, 32, 32), "crop_pct": 1.0}
    train = ImageDataset(digits["train"], ImageTransform(size, training=True, hflip=0.0, scale=(0.7, 1.0)))
    test = ImageDataset(digits["validation"], ImageTransform(size, training=False))
    train_loader = DataLoader(train, BATCH, shuffle=True, collate_fn=collate)
    test_loader = DataLoader(test, BATCH, collate_fn=collate)

    model = timm.create_model("resnet10t", num_classes=10)
    # PGT 2. plain: create_optimizer_v2(model, "sgd", lr=LR, momentum=0.9, weight_decay=5e-4), which is Nesterov's too
    optimizer = create_optimizer(model, "powergrad_sgd", lr=LR, alpha=0.25, momentum=0.9, weight_decay=5e-4)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=EPOCHS * len(train_loader))
    model, optimizer, scheduler, train_loader, test_loader = accelerator.prepare(
        model, optimizer, scheduler, train_loader, test_loader
    )

    for epoch in range(EPOCHS):
        model.train()
        train.set_epoch(epoch)
        for batch in train_loader:
            loss = cross_entropy(model(batch["pixel_values"]), batch["labels"])
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        accelerator.print(f"epoch {epoch + 1:2}  last training loss {loss.item():.4f}")

    fold_powergrad(accelerator.unwrap_model(model), alpha=0.25)  # PGT 3. the probabilities that were trained
    model.eval()
    correct = total = 0
    for batch in test_loader:
        with torch.no_grad():
            predicted = model(batch["pixel_values"]).argmax(dim=1)
        predicted, labels = accelerator.gather_for_metrics((predicted, batch["labels"]))
        correct += (predicted == labels).sum().item()
        total += len(labels)
    accelerator.print(f"test accuracy {correct / total:.2%} of {total} images")
    accelerator.end_training()


if __name__ == "__main__":
    main()
