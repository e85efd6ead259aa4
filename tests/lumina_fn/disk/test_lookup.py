"""A row's file is found where its name means it, one file exactly, and never outside the folders that the user named."""

import unicodedata

import pytest

from lumina_fn.disk import lookup
from lumina_fn.errors import InputError


@pytest.fixture
def root(tmp_path):
    lookup._names.cache_clear()
    (tmp_path / "root" / "Images").mkdir(parents=True)
    return tmp_path / "root"


def touched(root, *names):
    for name in names:
        (root / name).touch()
    return root


@pytest.mark.parametrize(
    ("there", "asked"),
    [
        ("Images/Cat.PNG", "images/cat.png"),
        ("Images/Cat.PNG", "Images\\Cat.PNG"),
        ("Images/Cat.PNG", ".\\images\\CAT.png"),
        (unicodedata.normalize("NFD", "Images/Ä é.png"), unicodedata.normalize("NFC", "Images/Ä é.png")),
        (unicodedata.normalize("NFC", "Images/Ä é.png"), unicodedata.normalize("NFD", "Images/Ä é.png")),
    ],
)
def test_a_name_as_another_system_writes_it_finds_the_one_file(root, there, asked):
    touched(root, there)
    at = lookup.locate(asked, [root])
    assert at.path == (root / there).resolve()
    assert not at.exact


def test_the_name_itself_comes_first(root):
    touched(root, "Images/a.png", "Images/A.png")
    assert lookup.locate("Images/A.png", [root]) == (root / "Images/A.png", True)
    (root / "Images/we\\ird.png").touch()
    assert lookup.locate("Images/we\\ird.png", [root]).exact
    assert lookup.locate(f"file://{root}/Images/a.png", [root]) == (root / "Images/a.png", True)
    touched(root, "Images/a b.png")
    assert lookup.locate(f"file://{root}/Images/a%20b.png", [root]).exact


def test_where_several_fit_none_is_taken(root):
    touched(root, "Images/a.png", "Images/A.png")
    with pytest.raises(InputError, match=r"several fit: Images/A.png, Images/a.png"):
        lookup.locate("images/a.PNG", [root])


@pytest.mark.parametrize(
    ("asked", "near"),
    [("Images/a.jpg", "Images/a.png"), ("elsewhere/top.png", "top.png"), ("Images/b.png", None), ("/a.png", None)],
)
def test_where_none_fits_the_nearest_is_named(root, asked, near):
    touched(root, "Images/a.png", "top.png")
    with pytest.raises(InputError) as refused:
        lookup.locate(asked, [root])
    assert ("is there" in str(refused.value)) == (near is not None)
    assert near is None or f"{near} is there" in str(refused.value)


def test_an_address_is_not_fetched(root):
    for address in ("https://example.com/x.png", "HTTP://example.com/x.png"):
        with pytest.raises(InputError, match="pictures are not downloaded"):
            lookup.locate(address, [root])


@pytest.mark.parametrize("asked", ["../outside/Secret.png", "..\\OUTSIDE\\secret.png", "images/../../outside/secret.PNG", "linked/SECRET.png", "linked/secret.jpg", "LINKED/secret.jpg", "LINKED/secret.PNG", "file:///etc/passwd", "/etc/PASSWD"])  # fmt: skip
def test_no_way_of_writing_a_name_leads_outside(root, asked):
    outside = root.parent / "outside"
    outside.mkdir()
    touched(outside, "secret.png", "secret.Png")
    (root / "linked").symlink_to(outside)
    with pytest.raises(InputError) as refused:
        lookup.locate(asked, [root])
    assert "secret" not in str(refused.value)
