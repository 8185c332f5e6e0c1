"""What both first stages are trained with beyond pixels: LPIPS from files, and a discriminator of patches."""

import pytest
import torch
import torch.nn.functional as F
from vgg_file import write_vgg16

from capstan.pipeline.dataset.shards import Dataset
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.storage import Storage
from capstan.training.config import TrainConfig
from capstan.training.data.dataset import TrainingData
from capstan.training.distributed.engine import Engine
from capstan.training.models.autoencoder.config import DiscriminatorSettings, PerceptualSettings
from capstan.training.models.autoencoder.discriminator import (
    PatchAdversary,
    PatchDiscriminator,
    adaptive_weight,
    discriminator_loss,
)
from capstan.training.models.autoencoder.family import AutoencoderFamily
from capstan.training.models.autoencoder.lpips import HEADS, VGG, load_lpips

SMALL = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4}
DISCRIMINATOR = {"start": 0, "channels": 4, "layers": 1}


def configure(**section):
    base = {"model": "autoencoder", "run": "unused", "steps": 1, "engine": {"strategy": "ddp", "threads": 1}}
    return TrainConfig.from_section(base | section)


@pytest.fixture
def data(squares):
    return TrainingData(Dataset(Storage(str(squares))), configure().data, 0, layer=None)


# LPIPS ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """Files of the shapes of torchvision's VGG16 and of LPIPS' heads, with random weights."""
    folder, draw = tmp_path_factory.mktemp("network"), torch.Generator().manual_seed(0)
    write_vgg16(folder)
    heads = {
        f"lin{number}.model.1.weight": torch.rand(1, width, 1, 1, generator=draw)
        for number, width in enumerate((64, 128, 256, 512, 512))
    }
    torch.save(heads, folder / HEADS)
    return folder


def test_lpips_is_what_the_paper_says(network):
    lpips = load_lpips(PerceptualSettings(network=str(network)), "x")
    a, b = torch.rand(2, 2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    weights, heads = torch.load(network / VGG), torch.load(network / HEADS)

    def features(x):
        """After the last ReLU of each block; "M" halves."""
        x = (x - torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1)) / torch.tensor([0.458, 0.448, 0.450]).view(
            3, 1, 1
        )
        layer, found = 0, []
        for convolutions in (2, 2, 3, 3, 3):
            for _ in range(convolutions):
                x = F.relu(F.conv2d(x, *(weights[f"features.{layer}.{k}"] for k in ("weight", "bias")), padding=1))
                layer += 2
            found.append(x)
            x, layer = F.max_pool2d(x, 2), layer + 1
        return found

    expected = 0
    for number, (of_a, of_b) in enumerate(zip(features(a), features(b), strict=True)):
        difference = (F.normalize(of_a, dim=1) - F.normalize(of_b, dim=1)).square()
        expected = expected + F.conv2d(difference, heads[f"lin{number}.model.1.weight"]).mean((1, 2, 3))
    with torch.no_grad():
        torch.testing.assert_close(lpips(a, b), expected, rtol=1e-4, atol=1e-5)
        assert lpips(a, a).abs().max() == 0


def test_lpips_has_a_gradient_also_where_nothing_is_felt(network):
    lpips = load_lpips(PerceptualSettings(network=str(network)), "x")
    with torch.no_grad():
        lpips.features[0].bias.fill_(-1e4)  # no feature of the first block is ever above 0
    a = torch.zeros(1, 3, 16, 16, requires_grad=True)
    lpips(a, torch.ones(1, 3, 16, 16)).sum().backward()
    assert a.grad.isfinite().all()


def test_lpips_trains_with_the_images_and_stays_as_it_is(network, data, tmp_path):
    perceptual = {"network": str(network), "weight": 0.5}
    train = configure(autoencoder=SMALL | {"perceptual": perceptual})
    AutoencoderFamily.make_assets(train, data, tmp_path)
    torch.manual_seed(0)
    family = AutoencoderFamily(train, tmp_path)
    family.to(torch.device("cpu"))
    batch = family.prepare([data.at(number) for number in range(2)])
    loss, metrics = family.loss(family.model, batch, torch.Generator().manual_seed(0))
    family.perceptual = None
    without, _ = family.loss(family.model, batch, torch.Generator().manual_seed(0))
    assert float((loss - without).detach()) == pytest.approx(0.5 * float(metrics["perceptual"]), rel=1e-4)
    assert not any(weight.requires_grad for weight in family.frozen[0].parameters())


@pytest.mark.parametrize(("missing", "named"), [(VGG, "torchvision's VGG16"), (HEADS, "LPIPS' heads")])
def test_a_file_that_is_not_there_is_named(missing, named, network, data, tmp_path):
    folder = tmp_path / "network"
    folder.mkdir()
    for name in {VGG, HEADS} - {missing}:
        (folder / name).symlink_to(network / name)
    train = configure(autoencoder=SMALL | {"perceptual": {"network": str(folder)}})
    problem = rf"train\.autoencoder\.perceptual\.network: no .*{missing}.* Fix: .*{named}"
    with pytest.raises(RecipeError, match=problem):
        AutoencoderFamily.make_assets(train, data, tmp_path)


def test_files_of_something_else_are_refused(network, tmp_path):
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / VGG)
    torch.save({}, tmp_path / HEADS)
    with pytest.raises(RecipeError, match=r"is not a VGG16"):
        load_lpips(PerceptualSettings(network=str(tmp_path)), "x")
    (tmp_path / VGG).unlink()
    (tmp_path / VGG).symlink_to(network / VGG)
    with pytest.raises(RecipeError, match=r"has no heads"):
        load_lpips(PerceptualSettings(network=str(tmp_path)), "x")
    (tmp_path / HEADS).write_bytes(b"not a file of torch")
    with pytest.raises(RecipeError, match=r"cannot be read"):
        load_lpips(PerceptualSettings(network=str(tmp_path)), "x")


# The discriminator ---------------------------------------------------------------------------------------------------


def test_a_logit_sees_a_patch_of_70_pixels():
    model = PatchDiscriminator(2, 3).eval()
    image = torch.randn(1, 3, 256, 256, requires_grad=True)
    logits = model(image)
    assert logits.shape == (1, 1, 30, 30)
    logits[0, 0, 15, 15].backward()
    seen = image.grad.abs().sum((0, 1)).nonzero()
    assert (seen.max(0).values - seen.min(0).values + 1).tolist() == [70, 70]


def test_losses_of_known_logits():
    real, made = torch.tensor([0.5, 2.0]), torch.tensor([-0.5, 1.0])
    assert discriminator_loss(real, made, "hinge").item() == pytest.approx(0.5 * (0.25 + 1.25))
    expected = F.binary_cross_entropy_with_logits(torch.cat([real, made]), torch.tensor([1.0, 1, 0, 0]))
    assert discriminator_loss(real, made, "vanilla").item() == pytest.approx(expected.item())


def test_the_weight_balances_gradients_at_the_last_layer():
    last = torch.tensor([3.0, 4.0], requires_grad=True)
    weight = adaptive_weight(last.square().sum() / 2, 0.1 * last.sum(), last)
    assert weight.item() == pytest.approx(5 / (0.1 * 2**0.5 + 1e-4))
    assert adaptive_weight(1e9 * last.sum(), 0 * last.sum(), last).item() == pytest.approx(1e4)


@pytest.fixture
def engine():
    engine = Engine(configure())
    yield engine
    engine.close()


def test_it_comes_in_at_its_step_and_learns_to_tell_images_apart(engine):
    torch.manual_seed(0)
    adversary = PatchAdversary(DiscriminatorSettings(start=2, channels=8, layers=1))
    adversary.attach(engine)
    before = [weight.clone() for weight in adversary.model.parameters()]
    real, last, seen = torch.rand(8, 3, 16, 16), torch.ones(1, requires_grad=True), []
    for step in range(40):
        adversary.set_step(step, 1e-3)
        made = last * real.flip(0) * 0.5
        opposed, metrics = adversary.adversarial_loss(made, real, last.square().sum(), last)
        assert all(weight.grad is None for weight in adversary.model.parameters())  # not its turn
        metrics = {**metrics, **adversary.step(last=True)}
        if step < 2:
            assert (float(opposed), metrics) == (0.0, {})
            assert all(map(torch.equal, before, adversary.model.parameters()))
        else:
            seen.append({name: float(value) for name, value in metrics.items()})
    assert {"adversarial", "adversarial_weight", "discriminator", "rival_grad_norm"} <= seen[0].keys()
    assert seen[-1]["discriminator"] < seen[0]["discriminator"]
    assert seen[-1]["told_apart"] > 0.9


def test_deepspeed_cannot_hold_the_second_model():
    with pytest.raises(
        RecipeError, match=r"train\.engine\.strategy: .*train\.autoencoder\.discriminator.*strategy: ddp"
    ):
        configure(engine={"strategy": "deepspeed"}, autoencoder=SMALL | {"discriminator": DISCRIMINATOR})


def test_a_compiled_model_has_no_adaptive_weight():
    engine = {"strategy": "ddp", "compile": True}
    with pytest.raises(RecipeError, match=r"train\.engine\.compile: .*adaptive: false"):
        configure(engine=engine, autoencoder=SMALL | {"discriminator": DISCRIMINATOR})
    configure(engine=engine, autoencoder=SMALL | {"discriminator": DISCRIMINATOR | {"adaptive": False}})


def test_more_layers_than_the_images_have_room_for_are_refused(data, tmp_path):
    train = configure(autoencoder=SMALL | {"discriminator": DISCRIMINATOR | {"layers": 3}})
    with pytest.raises(RecipeError, match=r"train\.autoencoder\.discriminator\.layers: 3 layers leave nothing of 16"):
        AutoencoderFamily.make_assets(train, data, tmp_path)
    assert PatchDiscriminator(4, 2)(torch.zeros(1, 3, 12, 12)).shape == (1, 1, 1, 1)
