"""Print a script that lets a shell complete commands, flags and files. It has the flags of this version.

alignment-gap completion bash >> ~/.bashrc
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import shlex
import textwrap
from collections.abc import Callable, Iterator, Mapping
from xml.etree import ElementTree

from alignment_gap.cli.flags import HELP_XML, parse, run_subcommand
from alignment_gap.cli.launch import LAUNCHED
from alignment_gap.cli.main import COMMANDS

# absl's own flags, which every command has.
_OF_ABSL = ("flagfile", "undefok")
# Maximum length of a description.
_LONGEST = 70


@dataclasses.dataclass(frozen=True)
class Flag:
    """A flag for completion: it takes a value or none; if there are `choices`, the value is one of them."""

    name: str
    about: str
    has_value: bool
    choices: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Place:
    """The completions after the words of a command: sub-commands with descriptions, and flags."""

    words: Mapping[str, str]
    flags: tuple[Flag, ...] = ()


def main(arguments: list[str]) -> None:
    """Prints the script for the shell that the first argument names."""
    run_subcommand(arguments, SUBCOMMANDS, __doc__)


def bash(arguments: list[str]) -> None:
    """Print the script for bash.

    alignment-gap completion bash >> ~/.bashrc
    """
    _print(arguments, bash_script, bash.__doc__)


def zsh(arguments: list[str]) -> None:
    """Print the script for zsh, for a folder of $fpath.

    alignment-gap completion zsh > ~/.zfunc/_alignment_gap
    """
    _print(arguments, zsh_script, zsh.__doc__)


def fish(arguments: list[str]) -> None:
    """Print the script for fish.

    alignment-gap completion fish > ~/.config/fish/completions/alignment-gap.fish
    """
    _print(arguments, fish_script, fish.__doc__)


SUBCOMMANDS: dict[str, Callable[[list[str]], None]] = {"bash": bash, "zsh": zsh, "fish": fish}


def _print(arguments: list[str], script: Callable[[Mapping[str, Place]], str], help_text: str | None) -> None:
    if parse(arguments, lambda values: None, help_text) is not None:
        print(script(places()))


def places() -> dict[str, Place]:
    """The completions by the words so far: "" (no words yet), "data", "data prepare", "launch study"."""
    found = {"": Place(COMMANDS)}
    for name in COMMANDS:
        command = importlib.import_module(f"alignment_gap.cli.{name}")
        subcommands: Mapping[str, Callable[[list[str]], None]] = getattr(command, "SUBCOMMANDS", {})
        if subcommands:
            found[name] = Place({word: _first_line(run) for word, run in subcommands.items()})
            found |= {f"{name} {word}": Place({}, _flags(run, f"{name} {word}")) for word, run in subcommands.items()}
        else:
            found[name] = Place({}, _flags(command.main, name))
    launched = {f"launch {words}": place for words, place in found.items() if words.split(" ")[0] in LAUNCHED}
    return found | launched | {"launch": Place({word: COMMANDS[word] for word in LAUNCHED}, found["launch"].flags)}


def _first_line(run: Callable[[list[str]], None]) -> str:
    return (run.__doc__ or "").splitlines()[0].rstrip(".")


def _flags(run: Callable[[list[str]], None], words: str) -> tuple[Flag, ...]:
    """The flags of a command, from absl's XML."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        run([f"alignment-gap {words}", HELP_XML])
    flags = [
        Flag(
            each.findtext("name", ""),
            textwrap.shorten(each.findtext("meaning", ""), _LONGEST, placeholder=" ..."),
            each.findtext("type") != "bool",
            tuple(choice.text or "" for choice in each.iter("enum_value")),
        )
        for each in ElementTree.fromstring(said.getvalue()).iter("flag")
    ]
    named = sorted((flag for flag in flags if flag.name not in _OF_ABSL), key=lambda flag: flag.name)
    return *named, Flag("help", "Show the flags and their defaults.", has_value=False)


def bash_script(found: Mapping[str, Place]) -> str:
    """The script for bash, which splits --flag=value at the equals sign. Readline completes files."""

    def quoted(words: Iterator[str]) -> str:
        return shlex.quote(" ".join(words))

    names = "|".join(shlex.quote(words) for words in found if words)
    offers = "\n".join(
        f"        {shlex.quote(words)}) words={quoted(iter(place.words))}"
        f" flags={quoted(f'--{flag.name}' + '=' * flag.has_value for flag in place.flags)} ;;"
        for words, place in found.items()
    )
    choices = "\n".join(
        f"        {shlex.quote(f'{words} --{flag.name}')}) choices={quoted(iter(flag.choices))} ;;"
        for words, flag in _with_choices(found)
    )
    return f"""\
# Completion of alignment-gap for bash.
_alignment_gap() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} place= flag= words= flags= choices= i
    for ((i = 1; i < COMP_CWORD; i++)); do
        case "${{place:+$place }}${{COMP_WORDS[i]}}" in
        {names}) place="${{place:+$place }}${{COMP_WORDS[i]}}" ;;
        esac
    done
    case $place in
{offers}
    esac
    if [[ $current == = ]]; then
        flag=$before current=
    elif [[ $before == = ]]; then
        flag=${{COMP_WORDS[COMP_CWORD-2]}}
    fi
    case "$place $flag" in
{choices}
    esac
    if [[ $flag ]]; then
        COMPREPLY=($(compgen -W "$choices" -- "$current"))
    elif [[ $current == -* ]]; then
        COMPREPLY=($(compgen -W "$flags" -- "$current"))
        if [[ ${{COMPREPLY[0]-}} == *= ]]; then compopt -o nospace 2> /dev/null; fi
    else
        COMPREPLY=($(compgen -W "$words" -- "$current"))
    fi
}}
complete -o default -F _alignment_gap alignment-gap"""


def zsh_script(found: Mapping[str, Place]) -> str:
    """The script for zsh, to put in a folder of $fpath or to source."""

    def flag(each: Flag) -> str:
        about = each.about.translate({ord(sign): f"\\{sign}" for sign in "[]:\\"})
        value = f":value:({' '.join(each.choices)})" if each.choices else ":value:_files"
        return shlex.quote(f"--{each.name}" + "=" * each.has_value + f"[{about}]" + value * each.has_value)

    def word(name: str, about: str) -> str:
        return shlex.quote(f"{name}:{about}")

    names = "|".join(shlex.quote(words) for words in found if words)
    offers = "\n".join(
        f"        {shlex.quote(words)}) subcommands=({' '.join(word(*each) for each in place.words.items())})"
        f" flags=({' '.join(map(flag, place.flags))}) ;;"
        for words, place in found.items()
    )
    return f"""\
#compdef alignment-gap
_alignment_gap() {{
    local place= word
    local -a subcommands flags
    for word in "${{(@)words[2,CURRENT-1]}}"; do
        case "${{place:+$place }}$word" in
        {names}) place="${{place:+$place }}$word" ;;
        esac
    done
    case $place in
{offers}
    esac
    if (( $#subcommands )) && [[ $words[CURRENT] != -* ]]; then
        _describe command subcommands
    else
        _arguments $flags '*:file:_files'
    fi
}}
if [[ $funcstack[1] == _alignment_gap ]]; then
    _alignment_gap "$@"
else
    compdef _alignment_gap alignment-gap
fi"""


def fish_script(found: Mapping[str, Place]) -> str:
    """The script for fish."""

    def quoted(text: str) -> str:
        return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"

    def lines() -> Iterator[str]:
        for words, place in found.items():
            here = (
                f"complete -c alignment-gap -n {quoted(f'string match -q -- {quoted(words)} (__alignment_gap_place)')}"
            )
            for word, about in place.words.items():
                yield f"{here} -f -a {quoted(word)} -d {quoted(about)}"
            for flag in place.flags:
                value = f" -x -a {quoted(' '.join(flag.choices))}" if flag.choices else " -r" * flag.has_value
                yield f"{here} -l {flag.name}{value} -d {quoted(flag.about)}"

    names = " ".join(quoted(words) for words in found if words)
    return "\n".join(
        (
            "# Completion of alignment-gap for fish.",
            "function __alignment_gap_place",
            "    set -l place ''",
            "    for word in (commandline -opc)[2..-1]",
            '        set -l next (string trim -- "$place $word")',
            f"        contains -- $next {names}; and set place $next",
            "    end",
            "    echo $place",
            "end",
            *lines(),
        )
    )


def _with_choices(found: Mapping[str, Place]) -> Iterator[tuple[str, Flag]]:
    for words, place in found.items():
        yield from ((words, flag) for flag in place.flags if flag.choices)
