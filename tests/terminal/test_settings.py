import pytest

from persimmon.errors import InputError
from persimmon.infer.params import SamplingParams
from persimmon.terminal.settings import SETTINGS, Settings


def test_sampling_is_what_stream_chat_takes() -> None:
    values = Settings(temperature=0.2, seed=7).sampling()
    assert SamplingParams.of(**values).temperature == 0.2
    assert values["seed"] == 7
    assert "drop_oldest" not in values


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("temperature", "0", 0.0),
        ("top-p", "0.5", 0.5),
        ("TOP_K", "40", 40),
        ("max_tokens", " 12 ", 12),
        ("seed", "3", 3),
        ("seed", "none", None),
        ("drop-oldest", "on", True),
        ("drop_oldest", "No", False),
    ],
)
def test_values_from_text(name: str, text: str, value: object) -> None:
    changed = Settings(seed=1).changed(name, text)
    assert getattr(changed, name.lower().replace("-", "_")) == value


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("temperature", "hot", "temperature takes a number, got 'hot'"),
        ("temperature", "-1", "temperature must be a number from 0 to 100, got -1.0"),
        ("temperature", "nan", "got nan"),
        ("top_k", "1.5", "top_k takes a whole number"),
        ("max_tokens", "0", "max_tokens must be an integer of at least 1"),
        ("max_tokens", "none", "max_tokens takes a whole number"),
        ("drop_oldest", "maybe", "drop_oldest is on or off"),
        ("temprature", "1", "did you mean temperature?"),
        ("zzz", "1", "there are temperature, "),
    ],
)
def test_wrong_values_are_refused(name: str, text: str, says: str) -> None:
    with pytest.raises(InputError, match=says.replace("?", r"\?")):
        Settings().changed(name, text)


@pytest.mark.parametrize("name", list(SETTINGS))
def test_shown_values_read_back(name: str) -> None:
    settings = Settings(seed=12_345_678_901, max_tokens=16_384)
    assert settings.changed(name, settings.shown(name)) == settings
    assert Settings().changed(name, Settings().shown(name)) == Settings()


@pytest.mark.parametrize("values", [None, [], {"temperature": "hot"}, {"nope": 1}, {"drop_oldest": 1}])
def test_settings_of_a_file_are_checked(values: object) -> None:
    with pytest.raises(InputError):
        Settings.from_json(values)
