"""Style transfer: the losses, what the command writes and reports, and the mistakes that it names."""

import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torchvision.models import vgg16
from vgg_file import write_vgg16

from capstan.cluster.cli import run
from capstan.pipeline.world import oracle
from capstan.pipeline.world.render import render
from capstan.pipeline.world.scene import Scene, Thing
from capstan.training.style.features import Encoder, Features, Vgg
from capstan.training.style.transfer import Goal, Weights, gram, relative, transfer

CONTENT = Scene(0, 0, "navy", (Thing("yellow", "circle", "large", "plain", 0.7, 0.7, 0.25),))
STYLE = Scene(0, 0, "brown", (Thing("pink", "star", "large", "striped", 0.3, 0.3, 0.25),))


@pytest.fixture(scope="module")
def product(tmp_path_factory):
    """The folder of a small first stage."""
    folder = tmp_path_factory.mktemp("product")
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    shape = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 32}
    AutoencoderKL(**blocks, **shape).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    Image.fromarray(render(CONTENT, 48)).crop((0, 0, 48, 40)).save(folder / "content.webp", lossless=True)
    Image.fromarray(render(STYLE, 40)).convert("CMYK").save(folder / "style.jpg")
    (folder / "page.png").write_text("<html>")
    return folder


@pytest.fixture
def style(images, monkeypatch, capsys):
    """Run `capstan style` on the images; return its summary, or what it printed on stderr if it failed."""
    monkeypatch.chdir(images)

    def style(*arguments, code=0, content="content.webp"):
        assert run(["style", content, "style.jpg", "--steps", "3", "--json", *map(str, arguments)]) == code
        printed = capsys.readouterr()
        return printed.err if code else json.loads(printed.out)

    return style


# The losses ----------------------------------------------------------------------------------------------------------


def test_a_gram_matrix_forgets_places():
    features = torch.rand(1, 4, 3, 5)
    shuffled = features.flatten(2)[:, :, torch.randperm(15)].view_as(features)
    torch.testing.assert_close(gram(shuffled), gram(features))
    expected = torch.einsum("chw,dhw->cd", features[0], features[0]) / 15
    torch.testing.assert_close(gram(features), expected)
    assert float(relative(2 * features, features)) == pytest.approx(1)


def seen(image):
    """A network that sees pixels, and pixels of half the size."""
    return Features([image, torch.nn.functional.avg_pool2d(image, 2)], image)


class Seen(torch.nn.Module):
    def forward(self, image):
        return seen(image)


@pytest.fixture
def pair():
    draw = torch.Generator().manual_seed(0)
    return [torch.rand(1, 3, 8, 8, generator=draw) * 1.6 - 0.8 for _ in range(2)]


def test_content_alone_restores_the_content_and_style_alone_the_gram_matrices(pair):
    noise = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(1)) - 0.5
    (kept,) = transfer(Seen(), *pair, noise, Weights(1, 0), [60])
    torch.testing.assert_close(kept.image, pair[0][0], atol=0.01, rtol=0)  # of 8 bits, and of a finite search
    (styled,) = transfer(Seen(), *pair, noise, Weights(0, 1), [60])
    assert styled.style < 1e-3 < 1e-2 < Goal(Seen(), *pair).stage(0, noise).style
    assert styled.content > 0.1


def test_steps_resume_one_search(pair):
    *_, whole = transfer(Seen(), *pair, pair[0], Weights(0.1, 1), [1, 4, 12])
    assert whole.steps == 12
    stages = transfer(Seen(), *pair, pair[0], Weights(0.1, 1), [4, 12])
    losses = [0.1 * stage.content + stage.style for stage in stages]
    assert losses[1] < losses[0] < float(Goal(Seen(), *pair).distances(pair[0])[1])


def test_strided_images_are_taken(pair):
    strided = [image.to(memory_format=torch.channels_last) for image in pair]
    (got,) = transfer(Seen(), *strided, strided[0], Weights(0.1, 1), [2])
    (expected,) = transfer(Seen(), *pair, pair[0], Weights(0.1, 1), [2])
    torch.testing.assert_close(got.image, expected.image)


def test_a_stage_is_measured_as_it_is_stored(pair):
    stage = Goal(Seen(), *pair).stage(0, 3 * pair[0])
    assert stage.image.abs().max() <= 1
    levels = (stage.image + 1) * 127.5
    torch.testing.assert_close(levels, levels.round(), atol=1e-3, rtol=0)


# The networks --------------------------------------------------------------------------------------------------------


def test_vgg16_shows_the_layers_of_the_paper():
    with torch.device("meta"):  # shapes alone
        seen = Vgg(vgg16(weights=None).features)(torch.zeros(1, 3, 32, 32))
    assert [tuple(layer.shape[1:]) for layer in seen.style] == [
        (64, 32, 32),
        (128, 16, 16),
        (256, 8, 8),
        (512, 4, 4),
        (512, 2, 2),
    ]
    assert tuple(seen.content.shape[1:]) == (512, 4, 4)


def test_an_encoder_shows_every_level(product):
    seen = Encoder(AutoencoderKL.from_pretrained(product).encoder)(torch.zeros(1, 3, 32, 32))
    assert [layer.shape[1] for layer in seen.style] == [8, 8, 16]
    assert seen.content is seen.style[-1]


# The command ---------------------------------------------------------------------------------------------------------


def test_the_result_is_nearer_to_the_style_and_keeps_the_content_s_size(style, product, caplog):
    with caplog.at_level("INFO"):
        summary = style("-o", "new/out.png", "--features", product, "--size", "40", "--sheet", "sheet.png")
    assert "no VGG16 is named" in caplog.text
    assert summary["features"] == f"encoder of {product}"
    assert summary["size"] == [48, 40]
    assert summary["images"][0]["style"] < summary["style_of_content"]
    with Image.open("new/out.png") as image:
        assert image.format == "PNG"
        assert image.size == (48, 40)
    with Image.open(summary["sheet"]) as image:
        assert image.width > 3 * 48
        assert image.height > 3 * 40


def test_one_file_per_seed_and_the_same_file_again(style, product):
    options = ("--features", product, "--noise", "1", "--seed")
    summary = style("-o", "out.png", *options, "3", "--seed", "4")
    assert [made["image"] for made in summary["images"]] == ["out-3.png", "out-4.png"]
    first, second = (np.asarray(Image.open(made["image"])) for made in summary["images"])
    assert (first != second).any()
    style("-o", "again.png", *options, "4")
    assert (np.asarray(Image.open("again.png")) == second).all()


def test_vgg16_comes_from_the_file_that_lpips_reads(style, tmp_path):
    file = write_vgg16(tmp_path)
    for named in (tmp_path, file):
        summary = style("-o", "vgg.png", "--vgg", named, "--size", "32", "--steps", "1")
        assert summary["features"] == f"VGG16 of {named}"
        assert summary["images"][0]["style"] < summary["style_of_content"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--vgg: is missing. Fix: name the folder of vgg16-397923af.pth"),
        (["--vgg", ".", "--features", "x"], "--vgg: cannot be combined with --features"),
        (["--vgg", "."], "--vgg: no vgg16-397923af.pth. Fix: copy vgg16-397923af.pth there"),
        (["--features", "nowhere"], "--features: no model at nowhere"),
        (["--seed", "1", "--seed", "2"], "--seed: makes no difference without noise"),
        (["--noise", "1", "--seed", "1", "--seed", "1"], "--seed: names a seed twice"),
        (["--sheet", "page.png/x.png"], "--sheet: cannot write page.png/x.png"),
        (["--steps", "0"], "'--steps'"),
    ],
)
def test_mistakes_are_named(style, arguments, said):
    err = style("-o", "bad.png", *arguments, code=2)
    assert said in err
    assert err.count("\n") <= 2


@pytest.mark.parametrize(
    ("content", "said"),
    [("none.png", "CONTENT: cannot read none.png (No such file"), ("page.png", "CONTENT: page.png: not_an_image")],
)
def test_files_that_are_no_images_are_named(style, product, content, said):
    assert said in style("-o", "bad.png", "--features", product, content=content, code=2)


def test_a_model_without_an_encoder_is_refused(style, tmp_path):
    (tmp_path / "open_clip_config.json").write_text("{}")
    assert "is not a first stage (captioner)" in style("-o", "bad.png", "--features", tmp_path, code=2)


def test_the_content_s_things_stay_in_place(product):
    """At a great content weight the things are where they were; how far less suffices is measured in benchmarks/."""
    content, styled = (
        (torch.from_numpy(render(scene, 48)).permute(2, 0, 1)[None].float() / 127.5 - 1) for scene in (CONTENT, STYLE)
    )
    network = Encoder(AutoencoderKL.from_pretrained(product).encoder)
    (stage,) = transfer(network, content, styled, content, Weights(100, 1), [5])
    image = ((stage.image.permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8).numpy()
    assert [thing.place for thing in oracle.parse(image).things] == ["at the bottom right"]
    assert stage.style < Goal(network, content, styled).stage(0, content).style
