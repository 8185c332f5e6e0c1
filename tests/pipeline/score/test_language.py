"""Caption language, by the model in the package and by one from a file."""

import pickle
import shutil
from pathlib import Path

import pytest

from capstan.pipeline.config import LanguageScore
from capstan.pipeline.errors import RecipeError
from capstan.pipeline.score import language
from capstan.pipeline.score.language import Language
from capstan.pipeline.score.scorer import Sample


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model file of the user. (Training one ends in NaN now and then: this wheel does not clear its memory.)"""
    return Path(shutil.copy(language._DEFAULT, tmp_path_factory.mktemp("language") / "lid.bin"))


def test_captions_get_a_language_and_its_probability(model: Path) -> None:
    scorer = pickle.loads(pickle.dumps(Language(LanguageScore(weights=str(model)))))
    scorer.setup("cpu")
    captions = [
        "the dogs are sitting\nin the street next to a house",
        "die Hunde sitzen in der Straße",
        "",
        "\ud800 the cat",
    ]
    found = scorer.score([Sample(caption) for caption in captions])
    assert found["language"][:3] == ["en", "de", None]
    assert found["language_score"][2] is None
    assert all(0.5 < found["language_score"][n] <= 1 for n in (0, 1))


def test_without_weights_the_model_in_the_package_is_used() -> None:
    scorer = pickle.loads(pickle.dumps(Language(LanguageScore())))
    (sha256,) = scorer.identity["weights"].values()
    assert sha256 == "8f3472cfe8738a7b6099e8e999c3cbfae0dcd15696aac7d7738a8039db603e83"
    scorer.setup("cpu")
    captions = {
        "en": "a brown dog runs along the beach in the evening sun",
        "de": "ein roter Kreis und ein blaues Quadrat",
        "fr": "un chat dort sur le canapé",
        "es": "una bicicleta roja delante de una casa",
        "ru": "кошка сидит на стуле",
        "ja": "猫が椅子に座っている",
    }
    found = scorer.score([Sample(caption) for caption in captions.values()])
    assert found["language"] == list(captions)
    assert min(found["language_score"]) > 0.5


def test_a_missing_or_broken_model_is_named(tmp_path: Path) -> None:
    scorer = Language(LanguageScore(weights=str(tmp_path / "lid.176.bin")))
    with pytest.raises(RecipeError, match=r"score.language.weights: no file .*Fix: copy lid.176.bin"):
        _ = scorer.id
    (tmp_path / "lid.176.bin").write_bytes(b"no model")
    with pytest.raises(RecipeError, match=r"score.language.weights: cannot load"):
        scorer.setup("cpu")
