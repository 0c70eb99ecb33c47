"""Write the bundled sample images: `python -m models.zoo.samples`."""

import argparse
import sys
from pathlib import Path

import torch
from torch import nn

from models.zoo.network import load_builtin, normalize
from models.zoo.objects import CLASSES, Sample, generate
from models.zoo.samples import FOLDER, write_sample
from models.zoo.seeds import Seed

# Chosen by eye among the first hundred: large, clear of the border, with distractors around.
CHOSEN = (27, 29, 77, 84)


@torch.inference_mode()
def named_class(network: nn.Module, sample: Sample) -> tuple[str, float]:
    """The class the network names, and its probability."""
    probabilities = network(normalize(sample.image[None])).softmax(dim=1)[0]
    best = int(probabilities.argmax())
    return CLASSES[best], float(probabilities[best])


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the bundled sample images and their masks.")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where to write (default: the package)")
    folder: Path = parser.parse_args().folder
    network = load_builtin()
    for index in CHOSEN:
        sample = generate(Seed.SAMPLES, index)
        name, probability = named_class(network, sample)
        if name != CLASSES[sample.label]:
            sys.exit(f"sample {index} is a {CLASSES[sample.label]}, but the network says {name}")
        file = write_sample(sample, folder)
        print(f"{file.image.name}: {name} with probability {probability:.3f}")


if __name__ == "__main__":
    main()
