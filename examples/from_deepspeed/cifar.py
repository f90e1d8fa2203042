"""A CNN on pictures of CIFAR-10's shape, as DeepSpeed's tutorial trains it: the data loader is the engine's, the criterion the script's.

    deepseed --num_gpus 2 examples/from_deepspeed/cifar.py --deepspeed --deepspeed_config examples/from_deepspeed/ds_config.json
"""

import argparse

import torch
import torch.nn.functional as F
from data import images, report
from torch import Tensor, nn

import deepseed as deepspeed  # was: import deepspeed


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = x.view(-1, 16 * 5 * 5)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        return self.fc3(x)


def add_argument() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="CIFAR")
    parser.add_argument("-e", "--epochs", default=2, type=int)
    parser.add_argument("--local_rank", type=int, default=-1, help="local rank passed from distributed launcher")
    parser = deepspeed.add_config_arguments(parser)
    return parser.parse_args()


def main() -> None:
    args = add_argument()
    deepspeed.init_distributed()
    torch.manual_seed(0)
    net = Net()
    parameters = filter(lambda p: p.requires_grad, net.parameters())
    model_engine, _, trainloader, _ = deepspeed.initialize(args=args, model=net, model_parameters=parameters, training_data=images(320))
    device = model_engine.device
    criterion = nn.CrossEntropyLoss()
    step, total = 0, 0.0
    for _ in range(args.epochs):
        for data in trainloader:
            inputs, labels = data[0].to(device), data[1].to(device)
            outputs = model_engine(inputs)
            loss = criterion(outputs, labels)
            model_engine.backward(loss)
            total += loss.item() / model_engine.gradient_accumulation_steps()
            boundary = model_engine.is_gradient_accumulation_boundary()
            model_engine.step()
            if boundary:
                step += 1
                report(step, total, model_engine.get_global_grad_norm())
                total = 0.0


if __name__ == "__main__":
    main()
