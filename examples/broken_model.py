"""A digit classifier that trains well and evaluates badly.

Its Batch Normalization was ported from TensorFlow, where momentum 0.999 weighs the old average. In PyTorch momentum
weighs the new batch, and 0.001 means the same: after 180 steps the running statistics still are mostly what they were
initialized with: 0.999¹⁸⁰ = 84 %.

    normscope check examples/broken_model.py:build_model --data build_loader --metric accuracy
    normscope fix examples/broken_model.py:build_model --data build_loader --metric accuracy -o fixed.pt
"""

from collections import OrderedDict

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from normscope import data


class DigitNet(nn.Module):
    """Three convolutions and a linear classifier."""

    def __init__(self):
        super().__init__()
        self.stem = self.block(1, 16)
        self.body = self.block(16, 32)
        self.head = self.block(32, 32)
        self.classify = nn.Linear(32, 10)

    @staticmethod
    def block(channels_in, channels_out):
        """Convolution, normalization, activation."""
        return nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False),
                bn=nn.BatchNorm2d(channels_out, momentum=0.001),  # in TensorFlow: momentum=0.999
                relu=nn.ReLU(),
            )
        )

    def forward(self, x):
        """Class scores of images."""
        x = nn.functional.max_pool2d(self.body(self.stem(x)), 2)
        return self.classify(self.head(x).mean((2, 3)))


def digits(part):
    """The embedded digits: images (n, 1, 8, 8) between 0 and 1, and their labels."""
    samples = data.load("digits")
    x, y = (samples.train_x, samples.train_y) if part == "train" else (samples.test_x, samples.test_y)
    return TensorDataset(torch.tensor(x).unsqueeze(1).float() / samples.top, torch.tensor(y).long())


def build_model():
    """Train for a few seconds, then hand over for evaluation."""
    torch.manual_seed(0)
    torch.set_num_threads(1)  # this network is too small for more
    model = DigitNet()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(4):
        for images, labels in DataLoader(digits("train"), batch_size=32, shuffle=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
    return model.eval()


def build_loader():
    """What the model will meet, in the same random order every time: the file's order is that of the writers."""
    return DataLoader(digits("test"), batch_size=20, shuffle=True, generator=torch.Generator().manual_seed(0))


def accuracy(output, batch):
    """One number per sample: 1 where the classifier is right."""
    return (output.argmax(1) == batch[1]).float()
