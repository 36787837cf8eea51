"""PyTorch's side of benchmarks/accelerator.py: torchvision's ResNet v1.5, in an environment that has torch alone.

    python torch_resnet.py MODE SECONDS JSON      MODE is eager, or one of torch.compile's: default, reduce-overhead

JSON: device (cuda or cpu), batch, pixels, num_classes, width, kind and layers of the network. channels_last, autocast to bfloat16, SGD with
momentum, one batch that lies on the device and is normalised already. Prints a line of JSON.
"""

import json
import sys
import time
from collections.abc import Callable

import torch
from torch import nn

WARM_UP_STEPS = 10


def conv_norm(inputs: int, outputs: int, kernel: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class Block(nn.Module):
    def __init__(self, kind: str, inputs: int, channels: int, stride: int):
        super().__init__()
        if kind == "bottleneck":  # the stride is in the 3×3: "v1.5"
            outputs = 4 * channels
            shapes = [(inputs, channels, 1, 1), (channels, channels, 3, stride), (channels, outputs, 1, 1)]
        else:
            outputs = channels
            shapes = [(inputs, channels, 3, stride), (channels, channels, 3, 1)]
        layers: list[nn.Module] = []
        for shape in shapes:
            layers += [conv_norm(*shape), nn.ReLU(inplace=True)]
        self.body = nn.Sequential(*layers[:-1])
        projects = stride != 1 or inputs != outputs
        self.shortcut = conv_norm(inputs, outputs, 1, stride) if projects else nn.Identity()
        self.relu = nn.ReLU(inplace=True)
        self.outputs = outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(self.body(x) + self.shortcut(x))


def resnet(kind: str, layers: list[int], width: int, num_classes: int) -> nn.Sequential:
    parts: list[nn.Module] = [conv_norm(3, width, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    inputs = width
    for stage, depth in enumerate(layers):
        for i in range(depth):
            block = Block(kind, inputs, width * 2**stage, 2 if stage and not i else 1)
            parts.append(block)
            inputs = block.outputs
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, num_classes))


def steps_per_second(step: Callable[[], None], wait: Callable[[], None], seconds: float) -> float:
    steps, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < seconds:
        for _ in range(10):
            step()
        wait()
        steps += 10
    return steps / (time.perf_counter() - begun)


def main() -> None:
    mode, seconds, settings = sys.argv[1], float(sys.argv[2]), json.loads(sys.argv[3])
    device = settings["device"]
    on_gpu = device == "cuda"
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    network = resnet(settings["kind"], settings["layers"], settings["width"], settings["num_classes"])
    network = network.to(device, memory_format=torch.channels_last).train()
    size, pixels = settings["batch"], settings["pixels"]
    images = torch.randn(size, 3, pixels, pixels, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(settings["num_classes"], (size,), device=device)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.001, momentum=0.875, weight_decay=1 / 32768)
    loss_of = nn.CrossEntropyLoss(label_smoothing=0.1)
    forward = network if mode == "eager" else torch.compile(network, mode=mode)

    def step() -> None:
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = loss_of(forward(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def wait() -> None:
        if on_gpu:
            torch.cuda.synchronize()

    begun = time.perf_counter()
    for _ in range(WARM_UP_STEPS):
        step()
    wait()
    compile_seconds = time.perf_counter() - begun
    figures = {
        "measured": f"torch, {mode}",
        "images_per_second": steps_per_second(step, wait, seconds) * size,
        "compile_seconds": compile_seconds,
        "kind": torch.cuda.get_device_name() if on_gpu else "cpu",
        "torch": torch.__version__,
        "parameters": sum(p.numel() for p in network.parameters()),
    }
    if mode == "reduce-overhead":
        from torch._dynamo.utils import counters

        # A part of the step that torch could not capture runs as it does without CUDA graphs.
        figures["cudagraph_skips"] = counters["inductor"]["cudagraph_skips"]
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
