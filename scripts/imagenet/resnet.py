"""ResNet-50 in plain PyTorch; its state dict has the names and shapes of torchvision's ``resnet50``.

Source: He et al. 2016 (arXiv:1512.03385), with the stride in the 3x3 convolution, as torchvision has it.
"""

from __future__ import annotations

from torch import Tensor, nn


class Bottleneck(nn.Module):
    """Convolutions 1x1, 3x3, 1x1 beside a shortcut; ``width`` channels inside, four times as many outside."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, inputs, h, w) to (batch, 4 width, h / stride, w / stride)."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        shortcut: Tensor = x if self.downsample is None else self.downsample(x)
        out: Tensor = self.relu(y + shortcut)
        return out


class ResNet(nn.Module):
    """A stem, four stages of bottlenecks, the mean over positions, and one linear layer, ``fc``."""

    def __init__(self, blocks: tuple[int, int, int, int], num_classes: int, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        inputs = width
        for stage, count in enumerate(blocks):
            inner = width * 2**stage
            stack = [Bottleneck(inputs, inner, 1 if stage == 0 else 2)]
            stack += [Bottleneck(4 * inner, inner, 1) for _ in range(count - 1)]
            self.add_module(f"layer{stage + 1}", nn.Sequential(*stack))
            inputs = 4 * inner
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """(batch, 3, h, w) to (batch, num_classes)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
        out: Tensor = self.fc(self.avgpool(x).flatten(1))
        return out


def resnet50(num_classes: int = 1000, width: int = 64) -> ResNet:
    """ResNet-50; a smaller ``width`` makes a narrower network of the same depth."""
    return ResNet((3, 4, 6, 3), num_classes, width)


def resnet14(num_classes: int = 1000, width: int = 64) -> ResNet:
    """ResNet-50 with one bottleneck a stage, to try things on."""
    return ResNet((1, 1, 1, 1), num_classes, width)
