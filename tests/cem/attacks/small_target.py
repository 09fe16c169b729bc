"""A small trained network, the images of an attacker, and how to run an attack on it: for tests of attacks."""

import logging
from functools import cache

import torch
from torch import nn
from torch.nn import functional as F

from cem.attacks.base import UNSEEN, VAL, Exposed, Own, Progress
from cem.data import ImageSet
from cem.data.synthetic import make_test_images
from cem.defenses import GaussianNoise
from cem.models import SplitModel

SHAPE, CLASSES = (1, 8, 8), 4


def fresh_model(seed=0):
    torch.manual_seed(seed)
    encoder = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1))
    server = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, CLASSES))
    return SplitModel(encoder, server, image_shape=SHAPE, defense=GaussianNoise(0.1))


@cache
def scene(each=16):
    """What lies open, the attacker's images, and the unseen ones."""
    images, labels = make_test_images(CLASSES, 5 * each, SHAPE)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).chunk(5)
    target, train, val, test, others = (ImageSet(images[at], labels[at], at, "train") for at in order)
    model = fresh_model().train()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(target.images.float() / 255), target.labels).backward()
        optimizer.step()
    optimizer.zero_grad()
    model.eval().requires_grad_(False)
    sent = {
        name: model.defense(model.encoder(pixels(images)))
        for name, images in ((VAL, val), (UNSEEN, test), ("heard", others))
    }
    heard = sent.pop("heard")
    return Exposed(model, sent, heard, CLASSES, SHAPE, 1, 0), Own(train, val), test


def pixels(images):
    return images.images.float() / 255


def error(guess, images):
    return F.mse_loss(guess, pixels(images)).item()


def class_mean_error(own, images):
    means = torch.stack([pixels(own.train)[own.train.labels == label].mean(0) for label in range(CLASSES)])
    return error(means[images.labels], images)


def progress_in(folder, show=lambda done, what: None, earlier=None, **key):
    folder.mkdir(exist_ok=True)
    return Progress(logging.getLogger("attack"), folder, key, earlier or {}, show)


def stopping_after(calls):
    """A show that interrupts the attack at its n-th call."""
    left = iter(range(calls - 1))

    def show(done, what):
        if next(left, None) is None:
            raise KeyboardInterrupt

    return show
