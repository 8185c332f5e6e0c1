"""What is said of the arms."""

from capstan.training.experiment.intervals import Interval
from capstan.training.experiment.results import ranking


def test_arms_of_equal_means_are_not_ranked() -> None:
    values = {"original": 0.25, "short95": 0.5, "descriptive95": 0.5}
    said = ranking({arm: Interval(mean, mean, mean) for arm, mean in values.items()})
    assert said == "short95 0.500 = descriptive95 0.500 > original 0.250"
