"""Flips, colour jitter and normalisation of whole batches, on whatever device the images are.

What is drawn for an image comes as one small tensor beside its pixels, ``augmentation`` of shape (1 + steps, 3): the
first row says whether it is flipped left to right and upside down, each other row is a step (a, g, m) of the jitter,

    pixels <- floor(clamp(a * pixels + g * grey(pixels) + m * round(mean(grey)), 0, 255))

so brightness by f is (f, 0, 0), contrast (f, 0, 1 - f) and saturation (f, 1 - f, 0).
"""

import torch
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as PIL converts to grey


def augment(images: Tensor, augmentation: Tensor) -> Tensor:
    """What ``ImageTransform(..., on_device=True)`` left out, for the whole batch.

    Args:
        images: uint8, of shape (N, 3, H, W).
        augmentation: Of shape (N, 1 + steps, 3); see above.

    Returns:
        float32, whole numbers from 0 to 255.

    Example:
        >>> dark = torch.tensor([[[0.0, 0.0, 0.0], [0.5, 0.0, 0.0]]])  # brightness by one half
        >>> augment(torch.full((1, 3, 2, 2), 9, dtype=torch.uint8), dark).unique()
        tensor([4.])
    """
    flips = augmentation[:, 0, :, None, None, None].bool()
    images = torch.where(flips[:, 0], images.flip(-1), images)
    images = torch.where(flips[:, 1], images.flip(-2), images).float()
    for step in augmentation[:, 1:].unbind(1):
        times, of_grey, of_mean = step[..., None, None, None].unbind(1)
        red, green, blue = images.split(1, dim=1)
        grey = LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue
        offset = of_grey * grey + of_mean * (grey.mean((2, 3), keepdim=True) + 0.5).floor()
        images = (times * images + offset).clamp_(0, 255).floor_()
    return images
