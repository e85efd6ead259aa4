"""A shell script's text divided into its simple commands and their words, as by a shell, and nothing expanded."""

import re
from collections.abc import Iterator
from typing import NamedTuple


class Unknown(ValueError):
    """A value that only a shell would know, or text that is not read here."""


class Piece(NamedTuple):
    """A part of a word that is quoted in one way."""

    text: str
    expands: bool  # $... in it is replaced
    splits: bool  # divided into words after it is expanded


class Statement(NamedTuple):
    """A simple command: its line and its words."""

    line: int
    words: list[list[Piece]]
    before: str  # what separates it from the statement before: a newline, ;, |, &, && or ||


def statements(text: str) -> Iterator[Statement]:
    """The script's simple commands, unexpanded. Raises Unknown for what has no end, arrays and here-documents."""
    words, word, at, line, start, before = [], None, 0, 1, 1, "\n"
    while at <= len(text):
        c = text[at : at + 1]
        if c in ("", "\n", ";", "|", "&", " ", "\t"):
            if word is not None:
                words.append(word)
                word = None
            if c not in (" ", "\t"):
                operator_ = c * 2 if c in ("|", "&") and text[at : at + 2] == c * 2 else c
                if words:
                    yield Statement(start, words, before)
                    words = []
                before = operator_
                at += max(len(operator_) - 1, 0)
            line += c == "\n"
            at += 1
            continue
        if word is None:
            if c == "#":
                end = text.find("\n", at)
                at = len(text) if end < 0 else end
                continue
            start = start if words else line
        if c in "<>":
            at = _redirection(text, at)
            if word is not None and not flat(word).isdecimal():  # 2>&1: the number is no word
                words.append(word)
            word = None
            continue
        if c in "()":
            raise Unknown(f"line {line}: `{c}` opens or closes what is not read (an array, a function)")
        piece, end = _piece(text, at)
        if text[at : at + 2] != "\\\n":
            word = [] if word is None else word
            word += piece
        line += text.count("\n", at, end)
        at = end


def flat(word: list[Piece]) -> str:
    """The word as it is written, without its quotes."""
    return "".join(piece.text for piece in word)


def _redirection(text: str, at: int) -> int:
    """The index where a redirection of input or output that begins at `at` ends."""
    match = re.compile(r"(>>|>|<)&?[ \t]*([^\s;|&<>]*)").match(text, at)
    if text.startswith("<<", at) or not match[2]:
        raise Unknown(f"{text[at : at + 20]!r} is not read")
    return match.end()


def _piece(text: str, at: int) -> tuple[list[Piece], int]:
    """The quoted or plain stretch that begins at `at`, and where it ends."""
    c = text[at]
    if c == "'":
        end = text.find("'", at + 1)
        if end < 0:
            raise Unknown("a quote has no end")
        return [Piece(text[at + 1 : end], False, False)], end + 1
    if c == "\\":
        return [Piece(text[at + 1 : at + 2], False, False)], at + 2
    if c == '"':
        return _double_quoted(text, at + 1)
    end = at
    while end < len(text) and text[end] not in " \t\n;|&<>()'\"\\":
        end = end_of(text, end) if text[end] in "$`" else end + 1
    return [Piece(text[at:end], True, True)], end


def _double_quoted(text: str, at: int) -> tuple[list[Piece], int]:
    pieces, begin = [], at
    while at < len(text) and text[at] != '"':
        if text[at] == "\\" and text[at + 1 : at + 2] in tuple('"\\$`\n'):
            literal = text[at + 1].replace("\n", "")
            pieces += [Piece(text[begin:at], True, False), Piece(literal, False, False)]
            begin = at = at + 2
        else:
            at = end_of(text, at) if text[at] in "$`" else at + 1
    if at >= len(text):
        raise Unknown("a quote has no end")
    return [*pieces, Piece(text[begin:at], True, False)], at + 1


def end_of(text: str, at: int) -> int:
    """The index where the reference ($... or `...`) that begins at `at` ends."""
    if text[at] == "`":
        return text.find("`", at + 1) + 1 or len(text)
    opened = text[at + 1 : at + 2]
    if opened and opened in "({":
        closing, depth = {"(": ")", "{": "}"}[opened], 0
        for i in range(at + 1, len(text)):
            depth += (text[i] == opened) - (text[i] == closing)
            if depth == 0:
                return i + 1
        raise Unknown(f"{text[at : at + 20]!r} has no end")
    return re.compile(r"\$([A-Za-z_]\w*|[^\w\s\"']|\d)?", re.ASCII).match(text, at).end()
