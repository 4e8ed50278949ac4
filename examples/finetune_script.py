"""A training loop of your own around a converted torchvision network: nothing of dynamize but the conversion, the
loss and the calibration.

    python examples/finetune_script.py            # scikit-learn's digits, enlarged; about a minute on a CPU
"""

import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset, random_split
from torchvision.models import resnet18

import dynamize as dz


def main(epochs: int = 3) -> None:
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1).repeat(1, 3, 1, 1) / 8 - 1
    images = torch.nn.functional.interpolate(images, size=32)
    dataset = TensorDataset(images, torch.tensor(digits.target))
    train, calibration, test = random_split(dataset, [1000, 400, 397])

    network = resnet18(num_classes=10)
    fit(network, DataLoader(train, 64, shuffle=True), torch.nn.functional.cross_entropy, epochs)

    dynamic = dz.convert(network, [dz.Exits(count=2)], input_shape=(3, 32, 32))
    loss = dz.MultiExitLoss(teacher=network)
    for _ in range(epochs):
        dynamic.train()
        optimizer = torch.optim.SGD(dynamic.parameters(), lr=0.02, momentum=0.9)
        for batch, labels in DataLoader(train, 64, shuffle=True):
            optimizer.zero_grad()
            loss(dynamic(batch), batch, labels).backward()  # in train() the network returns the logits of all exits
            optimizer.step()

    points = dz.calibrate(dynamic, DataLoader(calibration, 64), teacher=network)
    dynamic.eval().set_operating_point(points.at(macs_ratio=0.7))
    with torch.no_grad(), dz.record_routing(dynamic) as routing:
        right = sum((dynamic(batch).argmax(1) == labels).sum().item() for batch, labels in DataLoader(test, 64))
    shares = " ".join(f"{share:.0%}" for share in routing.shares(dynamic.exit_count))
    print(f"{right / len(test):.1%} of the test images right; share leaving at each exit: {shares}")
    dz.save(dynamic, "runs/digits")


def fit(network, loader, loss, epochs):
    optimizer = torch.optim.SGD(network.train().parameters(), lr=0.05, momentum=0.9)
    for _ in range(epochs):
        for batch, labels in loader:
            optimizer.zero_grad()
            loss(network(batch), labels).backward()
            optimizer.step()
    network.eval()


if __name__ == "__main__":
    main()
