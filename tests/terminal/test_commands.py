import json
from pathlib import Path

import pytest

from persimmon.errors import ContextLengthError, InputError, NotFoundError, PersimmonError
from persimmon.terminal.attachments import TextFile
from persimmon.terminal.commands import ALIASES, COMMANDS, Commands, is_command, is_open_block, unwrapped
from persimmon.terminal.conversation import Exchange
from persimmon.terminal.dialogue import Dialogue
from persimmon.terminal.settings import SETTINGS, Settings
from terminal.scripted_model import ScriptedModel, echo


@pytest.fixture
def talk() -> Dialogue:
    return Dialogue(ScriptedModel(echo), Settings())


@pytest.fixture
def commands(talk: Dialogue) -> Commands:
    return Commands(talk, "mini")


@pytest.mark.parametrize("line", ["/help", "/set top_p 1", "/?", "/nonsense", "/system a\nb"])
def test_commands(line: str) -> None:
    assert is_command(line)


@pytest.mark.parametrize("line", ["hello", " /help", "/usr/bin is where?", "/ 2", "//", "", "1/2"])
def test_messages(line: str) -> None:
    assert not is_command(line)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (" hi ", "hi"),
        ('"""two\nlines"""', "two\nlines"),
        ('"""\n  two\nlines\n"""\n', "  two\nlines"),
        ('""" open', " open"),
        ('""""""', ""),
        ('say """x"""', 'say """x"""'),
        ("a\nb", "a\nb"),
    ],
)
def test_unwrapped(text: str, message: str) -> None:
    assert unwrapped(text) == message


@pytest.mark.parametrize(
    ("text", "is_open"),
    [
        ('"""', True),
        ('"""a\nb', True),
        ('""""', True),
        ('"""a"""', False),
        ('""""""', False),
        ("a", False),
        ("", False),
    ],
)
def test_open_blocks(text: str, is_open: bool) -> None:
    assert is_open_block(text) == is_open


def test_help_lists_every_command_and_every_command_runs(commands: Commands) -> None:
    shown = " ".join(name for name, _ in commands.run("/help").rows)
    for command in COMMANDS:
        assert command.name in shown
        try:
            commands.run(command.name)
        except PersimmonError as error:
            assert "no command" not in str(error)
    for alias, name in ALIASES.items():
        assert commands.run(alias) == commands.run(name)


def test_the_page_on_the_chat_lists_commands_and_settings() -> None:
    page = (Path(__file__).parents[2] / "docs" / "chat.md").read_text()
    for command in COMMANDS:
        assert f"`{f'{command.name} {command.argument}'.strip()}`".replace("|", "\\|") in page
    for name in SETTINGS:
        assert f"`{name}`" in page


def test_unknown_commands_are_explained(commands: Commands) -> None:
    with pytest.raises(InputError, match=r"no command /hlep; did you mean /help\?"):
        commands.run("/hlep")
    with pytest.raises(InputError, match=r"/help lists them \(a space in front sends it as a message\)"):
        commands.run("/xyzzy")


def test_system(commands: Commands, talk: Dialogue) -> None:
    assert commands.run("/system").text == "There is no system text."
    commands.run('/system """Be\nbrief."""')
    assert talk.conversation.system == "Be\nbrief."
    assert commands.run("/system").text == "Be\nbrief."
    commands.run("/system clear")
    assert talk.conversation.system == ""


def test_files(commands: Commands, talk: Dialogue, tmp_path: Path) -> None:
    path = tmp_path / "the menu.txt"
    path.write_text("soup")
    outcome = commands.run(f"/file '{path}'")
    assert outcome.text == "Attached the menu.txt, 26 tokens; it goes with the next message."
    assert outcome.gauge
    assert commands.run(f"/file {path}").text.startswith("Replaced")
    assert commands.run("/file").rows == [("the menu.txt", "26 tokens")]
    commands.run("/file clear")
    assert talk.conversation.files == []
    assert "attaches one" in commands.run("/file").text
    with pytest.raises(NotFoundError):
        commands.run("/file /no/such/file")
    path.write_text("soup " * 4000)
    with pytest.raises(ContextLengthError):
        commands.run(f"/file {path}")


def test_undo_gives_the_files_back(commands: Commands, talk: Dialogue, tmp_path: Path) -> None:
    (tmp_path / "menu.txt").write_text("soup")
    commands.run(f"/file {tmp_path / 'menu.txt'}")
    reply = talk.ask("What is\nthere? " + "x" * 60)
    "".join(reply)
    talk.keep(reply)
    outcome = commands.run("/undo")
    assert outcome.text == f"Took back: What is there? {'x' * 42}... (menu.txt goes with the next message again)"
    assert [file.name for file in talk.conversation.files] == ["menu.txt"]
    with pytest.raises(InputError, match="nothing to take back"):
        commands.run("/undo")


def test_context(commands: Commands, talk: Dialogue) -> None:
    talk.conversation.system = "Be brief."
    talk.conversation.exchanges = [Exchange("a", (), "b")]
    outcome = commands.run("/context")
    assert [name for name, _ in outcome.rows] == ["system text", "1 exchange", "waiting files", "free"]
    assert outcome.rows[0][1] == "9 tokens"
    numbers = [int(value.split()[0].replace(",", "")) for _, value in outcome.rows]
    assert sum(numbers) == 16_384
    assert outcome.gauge


@pytest.mark.parametrize("line", ["/set temperature 0.2", "/set temperature=0.2", "/set  temperature   0.2"])
def test_set(commands: Commands, talk: Dialogue, line: str) -> None:
    assert commands.run(line).text == "temperature is 0.2."
    assert talk.settings.temperature == 0.2
    assert commands.run("/set temperature").text == "temperature is 0.2."
    assert [name for name, _ in commands.run("/set").rows] == list(SETTINGS)


def test_set_refuses(commands: Commands, talk: Dialogue) -> None:
    for line in ("/set heat 1", "/set top_p 2"):
        with pytest.raises(InputError):
            commands.run(line)
    assert talk.settings == Settings()


def test_retry_says_when_it_is_in_vain(commands: Commands) -> None:
    assert commands.run("/retry").text == ""
    commands.run("/set temperature 0")
    assert "stays the same" in commands.run("/retry").text


def test_save_and_load(commands: Commands, talk: Dialogue, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs a path"):
        commands.run("/save")
    talk.conversation.exchanges = [Exchange("a", (), "b")]
    talk.conversation.system = "Be brief."
    path = tmp_path / "talk.json"
    assert commands.run(f"/save {path}").text == f"Saved to {path}."
    talk.conversation.exchanges.append(Exchange("c", (), "d"))
    commands.run("/save")
    commands.run("/clear")
    commands.run("/set temperature 0")
    outcome = commands.run(f"/load {path}")
    assert outcome.text == f"Loaded 2 exchanges from {path}."
    assert [exchange.question for exchange in talk.conversation.exchanges] == ["a", "c"]
    assert talk.conversation.system == "Be brief."
    assert talk.settings.temperature == 0.7
    talk.attach(TextFile("waits.txt", "words"))
    assert "It was held with mini." in Commands(talk, "8b").run(f"/load {path}").text
    assert [file.name for file in talk.conversation.files] == ["waits.txt"], "what waits is not lost"


def test_a_wrong_file_changes_nothing(commands: Commands, talk: Dialogue, tmp_path: Path) -> None:
    talk.conversation.exchanges = [Exchange("a", (), "b")]
    (tmp_path / "f.json").write_text(json.dumps({"format": "persimmon-conversation", "version": 1}))
    for argument in (str(tmp_path / "f.json"), str(tmp_path / "missing"), ""):
        with pytest.raises(PersimmonError):
            commands.run(f"/load {argument}")
    assert len(talk.conversation.exchanges) == 1


def test_clear_and_quit(commands: Commands, talk: Dialogue) -> None:
    talk.conversation.exchanges = [Exchange("a", (), "b")]
    talk.conversation.system = "Be brief."
    assert commands.run("/clear").text == "A new conversation; the system text stays."
    assert not talk.conversation.exchanges
    assert commands.run("/quit").quit
    assert commands.run("/BYE").quit
