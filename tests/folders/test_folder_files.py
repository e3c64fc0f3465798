"""Files of a folder as a stranger may have written them: which count, what is read, what is refused by name."""

import json
import zipfile

import pytest
import torch
from hostile_folders import RunsCode
from safetensors.torch import save_file

from draft_opd_trl.core.errors import InputError, NotFoundError
from draft_opd_trl.folders import folder_files
from draft_opd_trl.folders.folder_files import read_ending, read_json, read_tensors, stray_weights, weight_files


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"a": 1', "cannot be read as JSON"),
        (b"\xff{}", "cannot be read as JSON .*utf-8"),
        (b'{"a": NaN}', "NaN is not a number that JSON knows"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[1]", "holds a list, not a JSON object"),
    ],
    ids=["cut", "encoding", "constant", "deep", "list"],
)
def test_json_that_is_none(tmp_path, content, words):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(InputError, match=f"{tmp_path}/x.json.*{words}.*Download or save the folder again"):
        read_json(tmp_path / "x.json")


def test_json_is_read_within_bounds(tmp_path, monkeypatch):
    file = tmp_path / "x.json"
    with pytest.raises(NotFoundError, match="is not there, or is no file"):
        read_json(file)
    file.write_text('{"a": "é"}')
    assert read_json(file) == {"a": "é"}
    monkeypatch.setattr(folder_files, "_MAX_JSON_BYTES", 5)
    with pytest.raises(InputError, match="has 11 bytes, more than a config can have"):
        read_json(file)


# -- which files count ---------------------------------------------------------------------------------------------

ONE, TWO = {"a": torch.ones(2)}, {"b": torch.zeros(3)}


@pytest.fixture
def sharded(tmp_path):
    save_file(ONE, tmp_path / "one.safetensors")
    save_file(TWO, tmp_path / "two.safetensors")
    return write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})


def write_index(folder, where):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return folder


def test_a_single_file_comes_before_an_index_and_pickles_last(sharded):
    assert weight_files(sharded) == {sharded / "one.safetensors": {"a"}, sharded / "two.safetensors": {"b"}}
    assert {name: tensor.tolist() for name, tensor in read_tensors(sharded).items()} == {"a": [1, 1], "b": [0, 0, 0]}
    torch.save({"a": torch.tensor([7.0])}, sharded / "pytorch_model.bin")
    assert sorted(read_tensors(sharded)) == ["a", "b"] and stray_weights(sharded) == []
    save_file(TWO, sharded / "model.safetensors")
    assert weight_files(sharded) == {sharded / "model.safetensors": None}
    assert stray_weights(sharded) == ["one.safetensors", "two.safetensors"]
    for file in sharded.glob("*.safetensors*"):
        file.unlink()
    assert read_tensors(sharded)["a"].tolist() == [7.0]


def test_a_folder_without_weights_says_what_it_has_instead(tmp_path):
    with pytest.raises(NotFoundError, match=r"holds no \*.safetensors file.*and no pytorch_model.bin. Download"):
        weight_files(tmp_path)
    save_file(ONE, tmp_path / "mine.safetensors")
    with pytest.raises(NotFoundError, match=r"though it has \['mine.safetensors'\]: name a single file model.safet"):
        weight_files(tmp_path)
    assert stray_weights(tmp_path) == []


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ({"a": "../one.safetensors"}, "which are no safetensors files in this folder"),
        ({"a": "one.bin"}, "which are no safetensors files in this folder"),
        ({"a": 1}, "has no weight_map of tensors to files"),
        ([], "has no weight_map of tensors to files"),
        ({"a": "gone.safetensors"}, r"lacks \['gone.safetensors'\], which model.safetensors.index.json names"),
        ({"x": "one.safetensors"}, "does not hold the tensors that the index says"),
    ],
)
def test_an_index_opens_nothing_elsewhere_and_says_what_is_there(sharded, where, words):
    write_index(sharded, where)
    with pytest.raises((InputError, NotFoundError), match=words):
        read_tensors(sharded)


# -- what is read of them ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        lambda mark: {"a": RunsCode(mark)},
        lambda mark: [torch.ones(1)],
        lambda mark: {"a": 1},
        lambda mark: {"a": torch.ones(1).expand(10**9)},
        lambda mark: {"a": torch.eye(2).to_sparse()},
    ],
    ids=["code", "list", "number", "expanded", "sparse"],
)
def test_a_pickle_that_holds_more_than_plain_tensors_is_not_read(tmp_path, content):
    torch.save(content(tmp_path / "mark"), tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="pytorch_model.bin (cannot be read as weights|is damaged)"):
        read_tensors(tmp_path)
    assert not (tmp_path / "mark").exists()


def test_a_pickle_that_unpacks_to_any_size_is_not_read(tmp_path):
    torch.save(ONE, tmp_path / "plain.bin")
    with (
        zipfile.ZipFile(tmp_path / "plain.bin") as plain,
        zipfile.ZipFile(tmp_path / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for part in plain.infolist():
            packed.writestr(part.filename, plain.read(part))
    with pytest.raises(InputError, match="its parts are compressed, as PyTorch never writes them"):
        read_tensors(tmp_path)


def test_one_tensor_alone_is_found_by_its_ending(tmp_path):
    file = tmp_path / "x.safetensors"
    save_file({"model.embed_tokens.weight": torch.ones(2), "lm_head.weight": torch.zeros(2)}, file)
    assert read_ending(file, "embed_tokens.weight").tolist() == [1, 1]
    assert read_ending(file, "norm.weight") is None
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(InputError, match="x.safetensors is damaged or cut short"):
        read_ending(file, "norm.weight")
