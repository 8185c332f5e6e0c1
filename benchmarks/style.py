"""Style transfer on the captioned world: how near the style comes, and whether the things stay in place.

    python benchmarks/style.py (--features RUN | --vgg DIR) [--pairs 12] [--size 64] [--steps 120] [--weights 0.1,0.3]

Contents are scenes of plain things, styles scenes of striped and dotted ones. Reported per content weight: the distance
of Gram matrices of the content image, of another scene of the style's kind, and of the result; the share of the
content's things in whose place the oracle finds one, next to that of another content's things (chance).
"""

from __future__ import annotations

import argparse
import math
import statistics

import numpy as np
import torch

from capstan.pipeline.world import oracle
from capstan.pipeline.world.captions import overlap
from capstan.pipeline.world.render import render
from capstan.pipeline.world.scene import Scene, Vocabulary, draw_scene
from capstan.training.style.features import open_encoder, open_vgg
from capstan.training.style.transfer import Goal, Weights, transfer

PLAIN = Vocabulary(textures=("plain",))
TEXTURED = Vocabulary(textures=("striped", "dotted"), min_objects=3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    network = parser.add_mutually_exclusive_group(required=True)
    network.add_argument("--features", help="a trained autoencoder or VQGAN: its run or product folder")
    network.add_argument("--vgg", help="the folder of vgg16-397923af.pth")
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--weights", default="0.1,0.3", help="content weights; the style's is 1")
    arguments = parser.parse_args()
    net = open_vgg(arguments.vgg, "--vgg") if arguments.vgg else open_encoder(arguments.features, "--features")
    print(f"{arguments.pairs} pairs of {arguments.size} pixels, {arguments.steps} steps")
    for weight in map(float, arguments.weights.split(",")):
        rows = [measured(net, number, arguments.size, arguments.steps, weight) for number in range(arguments.pairs)]
        start, kind, end, place, chance = (statistics.mean(column) for column in zip(*rows, strict=True))
        by = math.exp(statistics.mean(math.log(row[0] / row[2]) for row in rows))
        print(
            f"content weight {weight:g}: Gram distance {start:.3g} → {end:.3g} (÷ {start / end:.0f}, "
            f"geometric mean of pairs ÷ {by:.0f}; another of the kind {kind:.3g}) · "
            f"in place {place:.2f} (chance {chance:.2f})"
        )


def measured(net: torch.nn.Module, number: int, size: int, steps: int, weight: float) -> tuple[float, ...]:
    """Return the style distance of content, of another style and of the result; things in place, and chance."""
    scene, other = draw_scene(0, number, PLAIN), draw_scene(0, number + 1, PLAIN)
    content, style = pixels(scene, size), pixels(draw_scene(5, number, TEXTURED), size)
    (stage,) = transfer(net, content, style, content, Weights(weight, 1.0), [steps])
    image = ((stage.image.permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8).numpy()
    found = [thing.place for thing in oracle.parse(image).things]
    with torch.no_grad():
        goal = Goal(net, content, style)
        start, kind = (goal.stage(0, one).style for one in (content, pixels(draw_scene(5, number + 1, TEXTURED), size)))
    places = (overlap(found, [thing.place for thing in truth.things]) for truth in (scene, other))
    return start, kind, stage.style, *places


def pixels(scene: Scene, size: int) -> torch.Tensor:
    """Return a drawing: float32 [1, 3, size, size] in −1 … 1."""
    drawn = np.ascontiguousarray(render(scene, size))
    return torch.from_numpy(drawn).permute(2, 0, 1)[None].float() / 127.5 - 1


if __name__ == "__main__":
    main()
