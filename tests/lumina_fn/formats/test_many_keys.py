"""A foreign checkpoint may hold any number of keys of any length: what is said of them is short, and is found in time that grows with them."""

import json
import time
from pathlib import Path

import pytest

from lumina_fn import sources
from lumina_fn.errors import InputError, listed
from lumina_fn.formats import mindspeed, names
from tests.support import folders


def with_extra(folder: Path, n: int, prefix: str) -> Path:
    """A Hugging Face folder with n empty tensors beside the model's."""
    folders.write_hf(folder, folders.small_state(), folders.SMALL)
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({f"{prefix}{i}": entry for i in range(n)}, separators=(",", ":")).encode()
    (folder / "extra.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    return folder


def test_of_many_names_five_are_listed_and_the_rest_counted():
    assert listed([]) == ""
    assert listed(list("abcde")) == "a, b, c, d, e"
    assert listed(list("abcdefg")) == "a, b, c, d, e and 2 more"
    assert listed(["a\x1b[2J\n"]) == "a\\x1b[2J\\n"
    assert len(listed({"x" * 10_000_000: 1})) < 210


@pytest.mark.parametrize("prefix", ["model.vqmodel.", "zzz"])  # ignored, unknown
def test_time_grows_with_the_keys_and_the_message_does_not(tmp_path, prefix):
    took, said = {}, {}
    for n in (12_500, 100_000):
        folder = with_extra(tmp_path / str(n), n, prefix)
        began = time.process_time()
        if prefix == "zzz":
            with pytest.raises(InputError, match="unknown") as error:
                sources.open_source(folder)
            said[n] = str(error.value)
        else:
            said[n] = "\n".join(sources.open_source(folder).remarks)
        took[n] = time.process_time() - began
        assert len(said[n]) < 500
        assert f"{prefix}0, {prefix}1, " in said[n]
        assert f"and {n - 5} more" in said[n]
    assert took[100_000] < 20 * took[12_500]  # 8 times the keys; every key against every key would be 64


def test_missing_and_misshapen_tensors_are_counted_too(tmp_path):
    state = {key: tensor[:1] for key, tensor in folders.small_state().items() if "norm" not in key}
    config = {**folders.SMALL, "num_hidden_layers": 8}
    folders.write_hf(tmp_path / "m", state, config)
    with pytest.raises(InputError, match=r"missing: .* and \d+ more; misshapen: .* and \d+ more") as error:
        sources.open_source(tmp_path / "m")
    assert len(str(error.value)) < 1500


def test_a_config_of_many_unknown_fields_is_refused_in_one_short_line(tmp_path):
    folder = folders.write_hf(
        tmp_path / "m", folders.small_state(), folders.SMALL | {f"f{i}": i for i in range(100_000)}
    )
    with pytest.raises(InputError, match=r"does not have the fields f0, .* and 99995 more") as error:
        sources.open_source(folder)
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("field", ["attention_dropout", "head_dim", "hidden_act", "rms_norm_eps", "mask_image_logits"])
def test_a_long_value_is_cut_where_it_is_quoted(tmp_path, field):
    folder = folders.write_hf(tmp_path / "m", folders.small_state(), folders.SMALL | {field: "x" * 1_000_000})
    try:
        [said] = sources.open_source(folder).remarks
    except InputError as error:
        said = str(error)
    assert f"{field} " in said
    assert len(said) < 1000


def test_what_stands_beside_mindspeeds_weights_is_counted_by_kind():
    [said] = mindspeed._ignored([f"kind{i}.x" for i in range(200_000)] + ["optimizer.a", "optimizer.b"])
    assert said.startswith("ignored 200002 entries beside the weights: kind0, kind1, ")
    assert said.endswith(" and 199991 more")
    assert mindspeed._ignored(["args", "optimizer.a", "optimizer.b"])[0].endswith(": args, optimizer (2)")


@pytest.mark.parametrize("table", [names.TRANSFORMER, names.MOVQGAN])
def test_a_name_is_read_only_where_its_numbers_are_numbers(table):
    for ours, theirs in table:
        number = lambda text, by: text.replace("*", by)
        for good in ("0", "7", "999999"):
            assert names.to_native(number(theirs, good), table) == number(ours, good)
            assert names.to_source(number(ours, good), table) == number(theirs, good)
        for bad in ("01", "1000000", "*", "x", "\u0661") if "*" in ours else ():
            assert names.to_native(number(theirs, bad), table) is None
        assert names.to_native(f"{number(theirs, '0')}.0", table) is None
        assert names.to_native(f"{number(theirs, '0')}\n", table) is None
