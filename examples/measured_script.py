"""Your own network and images, converted, measured and reported: what `dynamize run` does, from a script.

python examples/measured_script.py            # scikit-learn's digits; half a minute on a CPU
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, random_split

import dynamize as dz


def main(epochs: int = 3) -> None:
    train, calibration, test = images()
    large, small = (trained(net, train, 2 * epochs) for net in (network(32, depth=6), network(16, depth=3)))
    done = dz.run_steps(
        large,
        [dz.Exits(count=2), dz.Distill(epochs=epochs), dz.Calibrate(max_drop=0.5)],  # drops are in points
        dz.splits(train=train, calibration=calibration, test=test),  # datasets, loaders or (images, labels)
        "runs/measured",  # report.html, ledger.json and the artifact
        compare={"small": small},  # what you would do instead
    )
    print(done)
    last = done.ledger.rows[-1]  # as numbers; drops are fractions here
    print(f"{last.macs_ratio:.0%} of the MACs, {100 * last.accuracy_drop:.2f} points lost, speed {last.speedup}")


def images():
    """Three parts of the digits, normalised."""
    torch.manual_seed(0)
    digits = load_digits()
    pixels = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    return random_split(TensorDataset(pixels, torch.tensor(digits.target)), [1000, 400, 397])


def network(width: int, depth: int) -> nn.Module:
    """A plain classifier of 8 x 8 images."""
    body = [block(1, width)] + [block(width, width) for _ in range(depth - 1)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def block(channels: int, width: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())


def trained(net: nn.Module, dataset, epochs: int) -> nn.Module:
    """Your own training."""
    optimizer = torch.optim.Adam(net.train().parameters(), lr=0.01)
    for _ in range(epochs):
        for batch, labels in DataLoader(dataset, 64, shuffle=True):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(batch), labels).backward()
            optimizer.step()
    return net.eval()


if __name__ == "__main__":
    main()
