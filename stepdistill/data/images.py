"""Real images for the methods that need them, and their captions: Fashion-MNIST, or any source of samples."""

import torch
from torch import Tensor

from stepdistill.data import fashion_mnist, picture
from stepdistill.data.forms import samples
from stepdistill.data.sample import UNREADABLE, Pictures, Sample
from stepdistill.data.tally import Tally
from stepdistill.errors import InputError
from stepdistill.recipe import Data


def load(data: Data, channels: int, size: int) -> tuple[Tensor, list[str], list[Pictures]]:
    """Images uint8 (N, channels, size, size) of ``data.images``, and the condition of each: a class name or a caption,
    and the pictures that ``data.arguments`` names.

    Images are cut to their middle square, and with them those pictures that have the same proportions. Samples that
    cannot be used are left out, counted and said.

    Raises:
        InputError: more than ``data.max_rejected`` of them cannot be used, or there are none.
    """
    if data.images == "fashion-mnist":
        try:
            images, labels = fashion_mnist.load("train")
        except FileNotFoundError as error:
            raise InputError(str(error)) from None
        if images.shape[1:] != (channels, size, size):
            raise InputError(f"fashion-mnist has 1x32x32 images, this pipeline wants {channels}x{size}x{size}")
        return images, [fashion_mnist.CLASS_NAMES[label] for label in labels.tolist()], []
    tally, pictures, conditions, inputs = Tally("data.images", data.max_rejected), [], [], []
    for sample in samples(data.images, data.caption_key, data.image_key, data.limit):
        if not tally.accepts(sample):
            continue
        if sample.image is None:
            tally.reject(sample, "no image")
            continue
        try:
            with sample.image() as file:
                image, notes = picture.read(file, "L" if channels == 1 else "RGB")
            own, more = _own_pictures(sample, data)
        except UNREADABLE as error:
            tally.reject(sample, f"unreadable image: {error}")
        except KeyError as error:
            tally.reject(sample, f"no picture {error.args[0]}")
        else:
            tally.note(sample, *dict.fromkeys([*notes, *more]))
            pictures.append(picture.scaled(picture.middle(image), channels, size))
            conditions.append(sample.caption)
            inputs.append({name: picture.middle(one, image.size) for name, one in own.items()})
    tally.close()
    if not pictures:
        raise InputError(f"data.images: expected images in {data.images}, found none")
    return torch.stack(pictures), conditions, inputs


def captions(data: Data, key: str = "images", aloud: bool = True) -> list[str]:
    """The captions of the source that ``data.images`` or ``data.conditions`` names, each once, in order.

    Args:
        aloud: say how many samples were rejected.

    Raises:
        InputError: more than ``data.max_rejected`` samples have none, or there are no samples.
    """
    source = getattr(data, key)
    if source == "fashion-mnist":
        return list(fashion_mnist.CLASS_NAMES)
    tally, found = Tally(f"data.{key}", data.max_rejected), {}
    for sample in samples(source, data.caption_key, data.image_key, data.limit):
        if tally.accepts(sample):
            found[sample.caption] = None
    tally.close(aloud)
    if not found:
        raise InputError(f"data.{key}: expected captions in {source}, found none")
    return list(found)


def requests(data: Data, key: str = "images", aloud: bool = True) -> tuple[list[str], list[Pictures]]:
    """Every caption of the source that ``data.images`` or ``data.conditions`` names, with its own pictures.

    Raises:
        InputError: more than ``data.max_rejected`` samples lack one or the other, or there are no samples.
    """
    tally, captions, pictures = Tally(f"data.{key}", data.max_rejected), [], []
    for sample in samples(getattr(data, key), data.caption_key, data.image_key, data.limit):
        if not tally.accepts(sample):
            continue
        try:
            own, notes = _own_pictures(sample, data)
        except UNREADABLE as error:
            tally.reject(sample, f"unreadable picture: {error}")
        except KeyError as error:
            tally.reject(sample, f"no picture {error.args[0]}")
        else:
            tally.note(sample, *notes)
            pictures.append(own)
            captions.append(sample.caption)
    tally.close(aloud)
    if not captions:
        raise InputError(f"data.{key}: expected captions with pictures in {getattr(data, key)}, found none")
    return captions, pictures


def _own_pictures(sample: Sample, data: Data) -> tuple[Pictures, list[str]]:
    """The pictures that ``data.arguments`` names, and what was changed of them."""
    found, notes = {}, {}
    for argument, key in data.arguments.items():
        with sample.other(key) as file:
            found[argument], changed = picture.read(file)
        notes |= dict.fromkeys(changed)
    return found, list(notes)
