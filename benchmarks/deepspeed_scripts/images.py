"""A script in the style of DeepSpeed's CIFAR example: data given to initialize, Adam and a warm-up from the JSON."""

import argparse
import json

import deepspeed
import torch
import torch.nn.functional as F
from torch import nn

parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int, default=-1)
parser.add_argument("--out", type=str)
parser = deepspeed.add_config_arguments(parser)
args = parser.parse_args()

deepspeed.init_distributed()
torch.manual_seed(0)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 5), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2 = nn.Linear(16 * 5 * 5, 64), nn.Linear(64, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc2(F.relu(self.fc1(torch.flatten(x, 1))))


net = Net()
generator = torch.Generator().manual_seed(1)
labels = torch.randint(0, 10, (96,), generator=generator)
images = torch.randn(96, 3, 32, 32, generator=generator) + labels[:, None, None, None] / 5
parameters = filter(lambda p: p.requires_grad, net.parameters())
engine, optimizer, loader, _ = deepspeed.initialize(
    args=args, model=net, model_parameters=parameters, training_data=torch.utils.data.TensorDataset(images, labels)
)
criterion = nn.CrossEntropyLoss()
losses = []
for _epoch in range(2):
    for data in loader:
        inputs, targets = data[0].to(engine.local_rank if torch.cuda.is_available() else "cpu"), data[1]
        loss = criterion(engine(inputs), targets.to(inputs.device))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
if torch.distributed.get_rank() == 0:
    with open(args.out, "w") as file:
        json.dump({"losses": losses, "lr": engine.get_lr()[0]}, file)
