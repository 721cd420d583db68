import dataclasses
import json

import pytest

from backends.checkpoint import Checkpoint
from backends.contract import StageSpec, TensorSpec
from backends.errors import CheckpointError, OptionError
from backends.options import ServingOptions
from backends.repository.pbtxt import ensemble_config, multimodal_config, parse, stage_config
from backends.repository.pipeline import build_pipeline, check_wiring
from backends.repository.writer import list_pipelines, remove, render, write
from tests.support import checkpoints, decoders, multimodal
from tests.support.checkpoints import sentence_transformer, write_json, xlm_roberta

MEAN = {"pooling_mode": "mean"}


@pytest.fixture
def path(tmp_path):
    return sentence_transformer(tmp_path / "c", MEAN)


def build(path, name="tiny", **options):
    given = ServingOptions(**options)
    return build_pipeline(name, str(path), Checkpoint.read(path, given.max_length), given)


def stages(pipeline):
    return {stage.stage: stage for stage in pipeline.stages}


def test_the_text_parses_back_to_what_was_meant(path):
    pipeline = build(
        path, dtype="bfloat16", max_batch_size=7, instances=2, device="cuda:1", served_model_name="org/tiny"
    )
    ensemble = parse(ensemble_config(pipeline))
    assert ensemble.platform == "ensemble"
    assert ensemble.max_batch_size == 7
    assert [step.model_name for step in ensemble.ensemble_scheduling.step] == [
        "tiny.tokenizer",
        "tiny.encoder",
        "tiny.dense",
        "tiny.tokens",
    ]
    assert [output.name for output in ensemble.output] == [
        "dense",
        "token_embeddings",
        "token_ids",
        "n_tokens",
        "truncated",
        "tokenizer_times",
        "encoder_times",
    ]
    parameters = {name: value.string_value for name, value in ensemble.parameters.items()}
    assert parameters == {
        "tasks": "embed,tokens",
        "pooling": "mean",
        "dtype": "bfloat16",
        "truncation": "error",
        "family": "bert",
        "checkpoint": str(path),
        "served_model_name": "org/tiny",
        "dimensions": "32",
        "max_length": "48",
        "max_batch_tokens": "16384",
    }
    encoder = parse(stage_config(pipeline, stages(pipeline)["encoder"]))
    assert encoder.backend == "python"
    assert encoder.max_batch_size == 7
    assert encoder.HasField("dynamic_batching")
    assert encoder.dynamic_batching.max_queue_delay_microseconds == 0
    assert [(group.count, list(group.gpus)) for group in encoder.instance_group] == [(2, [1])]
    assert all(tensor.allow_ragged_batch for tensor in encoder.input)
    assert (
        encoder.output[0].data_type
        == encoder.output[0]
        .DESCRIPTOR.fields_by_name["data_type"]
        .enum_type.values_by_name["TYPE_BF16"]
        .number
    )
    assert encoder.parameters["dtype"].string_value == "bfloat16"


@pytest.mark.parametrize(("device", "kind"), [("auto", 0), ("cpu", 2), ("cuda", 1)])
def test_the_device_becomes_a_kind_of_instance(path, device, kind):
    pipeline = build(path, device=device)
    assert parse(stage_config(pipeline, stages(pipeline)["encoder"])).instance_group[0].kind == kind
    assert parse(stage_config(pipeline, stages(pipeline)["tokenizer"])).instance_group[0].kind == 2


@pytest.mark.parametrize(("device", "on_gpu"), [("auto", True), ("cpu", False), ("cuda:1", True)])
def test_hidden_states_are_handed_over_on_a_gpu(path, device, on_gpu):
    pipeline = build(path, device=device)
    for name, stage in stages(pipeline).items():
        config = parse(stage_config(pipeline, stage))
        is_left_there = on_gpu and name != "tokenizer"
        known = {key: value.string_value for key, value in config.parameters.items()}
        assert known.get("FORCE_CPU_ONLY_INPUT_TENSORS") == ("no" if is_left_there else None)
        assert ServingOptions.from_parameters(known).device == device


@pytest.mark.parametrize(
    ("make", "task", "sent"),
    [
        (decoders.qwen3_reranker, None, "last_hidden"),
        (decoders.qwen3_embedding, "embed", "last_hidden"),
        (decoders.qwen3_embedding, None, "hidden"),
        (checkpoints.bge_m3, "embed", "hidden"),
    ],
)
def test_one_token_of_each_text_is_sent_where_no_head_reads_more(tmp_path, make, task, sent):
    checkpoint = Checkpoint.read(make(tmp_path / "c"))
    pipeline = build_pipeline("c", str(tmp_path / "c"), checkpoint, ServingOptions(task=task))
    stages = {stage.stage: stage for stage in pipeline.stages}
    assert [spec.name for spec in stages["encoder"].outputs] == [sent, "encoder_times"]
    head = stages["logits"] if "logits" in stages else stages["dense"]
    names = [spec.name for spec in head.inputs]
    assert names == ([sent] if sent == "last_hidden" else [sent, "length"])
    assert head.parameters.get("reads") == (sent if sent == "last_hidden" else None)


@pytest.mark.parametrize(
    ("make", "task", "read", "made"),
    [
        (
            checkpoints.bge_m3,
            None,
            [],
            ["dense", "sparse_indices", "sparse_weights", "sparse_count", "token_vectors", "vector_count"],
        ),
        (checkpoints.bge_m3, "embed", [], ["dense"]),
        (checkpoints.bge_m3, "tokens", [], ["token_embeddings", "token_ids"]),
        (checkpoints.pylate, None, ["key_length"], ["token_vectors", "vector_count"]),
        (decoders.qwen3_reranker, None, [], ["logits"]),
        (lambda path: checkpoints.classifier(path, checkpoints.bert), None, ["first_length"], ["logits"]),
        (
            lambda path: sentence_transformer(path, {**MEAN, "include_prompt": False}),
            None,
            ["prompt_length"],
            ["dense"],
        ),
    ],
)
def test_fused_heads_are_outputs_of_the_encoder(tmp_path, make, task, read, made):
    path = make(tmp_path / "c")
    pipeline = build(path, task=task, fuse_heads=True)
    assert list(stages(pipeline)) == ["tokenizer", "encoder"]
    encoder = parse(stage_config(pipeline, stages(pipeline)["encoder"]))
    assert [tensor.name for tensor in encoder.input] == ["input_ids", "length", *read]
    assert all(tensor.allow_ragged_batch for tensor in encoder.input)
    assert [tensor.name for tensor in encoder.output] == [*made, "encoder_times"]
    assert encoder.parameters["fuse_heads"].string_value == "true"
    ensemble = parse(ensemble_config(pipeline))
    steps = {step.model_name: step for step in ensemble.ensemble_scheduling.step}
    assert list(steps) == ["tiny.tokenizer", "tiny.encoder"]
    assert dict(steps["tiny.encoder"].output_map) == {name: name for name in (*made, "encoder_times")}
    account = ["n_tokens", "truncated", "tokenizer_times", "encoder_times"]
    assert [tensor.name for tensor in ensemble.output] == [*made, *account]
    plain = parse(ensemble_config(build(path, task=task)))
    own = {tensor.name: tensor for tensor in plain.output}
    assert all(tensor == own[tensor.name] for tensor in ensemble.output), "types and shapes are the same"


def test_every_token_s_vector_is_fused_only_when_it_is_asked_for(path):
    """The server would have it computed and sent for every request."""
    assert build(path).parameters["tasks"] == "embed,tokens"
    assert build(path, fuse_heads=True).parameters["tasks"] == "embed"
    assert build(path, fuse_heads=True, task="tokens").parameters["tasks"] == "tokens"


def test_a_model_of_images_is_fused_in_both_ensembles(tmp_path):
    pipeline = build(multimodal.gme(tmp_path / "gme"), "gme", fuse_heads=True)
    second = parse(multimodal_config(pipeline))
    assert [step.model_name for step in second.ensemble_scheduling.step] == [
        "gme.image",
        "gme.tokenizer",
        "gme.encoder",
    ]
    assert set(second.ensemble_scheduling.step[2].output_map) == {"dense", "encoder_times"}


def test_writing_again_with_fused_heads_takes_theirs_away_and_brings_them_back(tmp_path, path):
    repository = tmp_path / "models"
    write(repository, build(path))
    plain = {entry.name for entry in repository.iterdir()}
    write(repository, build(path, fuse_heads=True))
    assert {entry.name for entry in repository.iterdir()} == {"tiny", "tiny.tokenizer", "tiny.encoder"}
    (entry,) = list_pipelines(repository)
    assert entry.options == ServingOptions(fuse_heads=True)
    write(repository, build(path))
    assert {entry.name for entry in repository.iterdir()} == plain


def test_unread_tensors_are_not_wired(path):
    def mapped(pipeline):
        step = parse(ensemble_config(pipeline)).ensemble_scheduling.step
        return set(step[0].output_map), set(step[2].input_map)

    always = {"input_ids", "length", "n_tokens", "truncated", "tokenizer_times"}
    assert mapped(build(path)) == (always, {"hidden", "length"})
    write_json(path / "1_Pooling" / "config.json", {**MEAN, "include_prompt": False})
    made, read = mapped(build(path))
    assert "prompt_length" in made
    assert "prompt_length" in read


@pytest.mark.parametrize(
    "change",
    [
        lambda p: dataclasses.replace(p, stages=p.stages[1:]),
        lambda p: dataclasses.replace(p, outputs=(TensorSpec("length", "INT32", (-1,)),)),
        lambda p: dataclasses.replace(p, outputs=(TensorSpec("nothing", "INT32", (-1,)),)),
        lambda p: dataclasses.replace(p, stages=(*p.stages, p.stages[-1])),
        lambda p: dataclasses.replace(
            p, stages=(*p.stages, StageSpec("x", "x.X", (TensorSpec("hidden", "FP16", (-1, 32)),), ()))
        ),
    ],
)
def test_wrong_wiring_is_found_before_the_server_sees_it(path, change):
    pipeline = build(path)
    check_wiring(pipeline)
    with pytest.raises(ValueError, match="tiny: "):
        check_wiring(change(pipeline))


def test_writes_lists_and_removes(tmp_path, path):
    repository = tmp_path / "models"
    write(repository, build(path, "a", dtype="float32"))
    write(repository, build(path, "a.b"))
    (repository / "README.md").write_text("kept")
    assert [(e.name, e.checkpoint, e.options.dtype) for e in list_pipelines(repository)] == [
        ("a", str(path), "float32"),
        ("a.b", str(path), "auto"),
    ]
    remove(repository, "a")
    assert sorted(p.name for p in repository.iterdir()) == [
        "README.md",
        "a.b",
        "a.b.dense",
        "a.b.encoder",
        "a.b.tokenizer",
        "a.b.tokens",
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c", "models"], (
        "nothing is left beside the repository"
    )


def test_writing_again_replaces(tmp_path, path):
    repository = tmp_path / "models"
    write(repository, build(path, max_batch_size=3))
    write(repository, build(path, max_batch_size=5))
    for entry, text in render(build(path, max_batch_size=5)).items():
        assert (repository / entry).read_text() == text


def test_a_folder_in_the_way_is_not_touched_nor_anything_else(tmp_path, path):
    repository = tmp_path / "models"
    (repository / "tiny.dense").mkdir(parents=True)
    (repository / "tiny.dense" / "mine").touch()
    with pytest.raises(CheckpointError, match=r"tiny\.dense is in the way and is not of this model"):
        write(repository, build(path))
    assert [str(p.relative_to(repository)) for p in repository.rglob("*")] == [
        "tiny.dense",
        "tiny.dense/mine",
    ]
    write(repository, build(path, "foo"))
    with pytest.raises(CheckpointError, match=r"foo\.encoder is in the way"):
        write(repository, build(path, "foo.encoder"))


def test_removing_what_is_not_there_names_what_is(tmp_path, path):
    repository = tmp_path / "models"
    write(repository, build(path))
    with pytest.raises(CheckpointError, match="has no model 'other'; it holds tiny"):
        remove(repository, "other")


def test_a_broken_config_names_its_file(tmp_path, path):
    repository = tmp_path / "models"
    write(repository, build(path))
    (repository / "tiny" / "config.pbtxt").write_text("name: {")
    with pytest.raises(CheckpointError, match=r"tiny/config\.pbtxt cannot be read"):
        list_pipelines(repository)


@pytest.mark.parametrize("name", ["a/b", "", ".hidden", "a b", "x" * 101])
def test_names_that_are_no_folders_are_refused(path, name):
    with pytest.raises(OptionError, match="cannot be used"):
        build(path, name)


@pytest.mark.parametrize(
    ("config", "sentence", "mark"),
    [
        ({"architectures": ["BertForTokenClassification"]}, {}, "ForTokenClassification"),
        ({"architectures": ["BertForQuestionAnswering"]}, {}, "ForQuestionAnswering"),
    ],
)
def test_checkpoints_for_other_tasks_are_not_served_as_embeddings_by_silence(path, config, sentence, mark):
    content = json.loads((path / "config.json").read_text())
    write_json(path / "config.json", {**content, **config})
    write_json(path / "config_sentence_transformers.json", sentence)
    if config:
        assert build(path).parameters["tasks"] == "embed,tokens", "modules.json says what it is for"
        (path / "modules.json").unlink()
    with pytest.raises(CheckpointError, match=f"made for a task that is not served yet .*{mark}"):
        build(path)
    assert build(path, task="dense_embedding").parameters["tasks"] == "embed"


def test_an_unknown_task_lists_the_known_ones(path):
    for word in ("embed", "DENSE_EMBEDDING", "dense-embedding"):
        assert build(path, task=word).parameters["tasks"] == "embed"
    with pytest.raises(
        OptionError, match=r"task is 'FROB'; it takes embed, dense_embedding, .*bge_m3, sparse"
    ):
        build(path, task="FROB")
    for word in ("RERANKER", "Classifier", "SEQ_CLASSIFICATION"):
        with pytest.raises(CheckpointError, match="has no classification head that is served"):
            build(path, task=word)


def test_max_length_is_within_the_positions_that_are_free(path, tmp_path):
    assert build(path, max_length=64).parameters["max_length"] == "64"
    with pytest.raises(OptionError, match="max_length is 65; this model takes at most 64"):
        build(path, max_length=65)
    # Two of its 66 positions are before the first token.
    with pytest.raises(OptionError, match="max_length is 65; this model takes at most 64"):
        build(xlm_roberta(tmp_path / "x"), max_length=65)


def test_a_model_of_texts_and_images_has_a_second_ensemble(tmp_path):
    path = multimodal.gme(tmp_path / "gme")
    pipeline = build(path, "gme")
    plain, second = parse(ensemble_config(pipeline)), parse(multimodal_config(pipeline))
    assert [step.model_name for step in plain.ensemble_scheduling.step] == [
        "gme.tokenizer",
        "gme.encoder",
        "gme.dense",
    ], "no image stage for texts"
    assert [step.model_name for step in second.ensemble_scheduling.step] == [
        "gme.image",
        "gme.tokenizer",
        "gme.encoder",
        "gme.dense",
    ]
    assert [spec.name for spec in second.input] == ["text", "image"]
    assert [spec.name for spec in second.output] == [*(spec.name for spec in plain.output), "image_times"]
    tokenizers = [
        step
        for config in (plain, second)
        for step in config.ensemble_scheduling.step
        if step.model_name == "gme.tokenizer"
    ]
    assert "patches" in tokenizers[0].output_map, "empty ones"
    assert "patches" not in tokenizers[1].output_map, "those come from the image stage"
    assert dict(tokenizers[1].input_map) == {"text": "text", "image_grid": "image_grid"}
    stage = parse(stage_config(pipeline, stages(pipeline)["tokenizer"]))
    assert [(spec.name, spec.optional) for spec in stage.input] == [("text", False), ("image_grid", True)]
    encoder = parse(stage_config(pipeline, stages(pipeline)["encoder"]))
    assert not any(spec.optional for spec in encoder.input), "else texts and images would not share batches"
    assert not second.parameters, "it describes no model of its own"
    facts = pipeline.parameters
    assert (facts["modalities"], facts["fuses"], facts["max_image_tokens"]) == ("text,image", "true", "1280")
    clip = build(multimodal.clip(tmp_path / "clip"), "clip").parameters
    assert (clip["modalities"], clip.get("fuses"), clip["max_image_tokens"]) == ("text,image", None, "10")


def test_both_ensembles_are_written_listed_once_and_removed(tmp_path, path):
    repository = tmp_path / "models"
    write(repository, build(multimodal.clip(tmp_path / "clip"), "clip"))
    write(repository, build(path, "tiny"))
    write(repository, build(path, "clip.other"))
    entries = {f.name for f in repository.iterdir()}
    assert {"clip", "clip.multimodal", "clip.image", "clip.tokenizer"} <= entries
    assert [entry.name for entry in list_pipelines(repository)] == ["clip", "clip.other", "tiny"]
    # The same name for a model of texts: nothing of the other stays.
    write(repository, build(path, "clip"))
    assert not {"clip.multimodal", "clip.image"} & {f.name for f in repository.iterdir()}
    write(repository, build(tmp_path / "clip", "clip"))
    remove(repository, "clip")
    assert {f.name for f in repository.iterdir() if f.name.startswith("clip")} == {
        name for name in entries if name.startswith("clip.other")
    }


def test_a_model_of_somebody_s_with_the_second_name_stays(tmp_path, path):
    repository = tmp_path / "models"
    write(repository, build(path, "clip"))
    write(repository, build(path, "clip.multimodal"))
    remove(repository, "clip")
    assert [entry.name for entry in list_pipelines(repository)] == ["clip.multimodal"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"chat_template": "gme-qwen2-vl"},
            "--chat-template gme-qwen2-vl is for models whose texts and images",
        ),
        ({"image_positions": "plain"}, "--image-positions plain is for"),
        ({"max_image_tokens": 5}, "--max-image-tokens 5 is for"),
    ],
)
def test_options_of_images_for_models_of_texts(path, tmp_path, options, message):
    for checkpoint in (path, multimodal.clip(tmp_path / "clip")):
        with pytest.raises(OptionError, match=message):
            build(checkpoint, **options)


def test_a_guess_is_told(tmp_path):
    bare = build(multimodal.qwen2_vl(tmp_path / "bare"))
    assert any("its prompt is gme-qwen2-vl" in note for note in bare.notes)
    for told in (
        build(multimodal.gme(tmp_path / "gme")),
        build(tmp_path / "bare", chat_template="gme-qwen2-vl"),
    ):
        assert not any("its prompt is" in note for note in told.notes)


def test_every_token_of_clip_cannot_be_had(tmp_path):
    with pytest.raises(CheckpointError, match="has one vector for each text or image"):
        build(multimodal.clip(tmp_path / "clip"), task="ALL_EMBEDDING")
    assert "tokens" in stages(build(multimodal.qwen2_vl(tmp_path / "q"), task="tokens"))


@pytest.mark.parametrize(
    ("mark", "is_told"),
    [
        ({"auto_map": {"AutoModel": "modeling_gme_qwen2vl.GmeQwen2VL"}}, True),
        ({"architectures": ["GmeQwen2VLForVision2Seq"]}, True),
        ({"architectures": ["SegmentationModel"], "auto_map": {"AutoModel": "augment.Model"}}, False),
    ],
)
def test_which_checkpoints_are_gme(tmp_path, mark, is_told):
    path = multimodal.qwen2_vl(tmp_path / "c")
    (path / "segment_utils.py").write_text("")
    write_json(path / "config.json", {**json.loads((path / "config.json").read_text()), **mark})
    made = build(path)
    assert made.parameters["max_image_tokens"] == ("1280" if is_told else "16384")
    assert any("does not say how it was trained" in note for note in made.notes) != is_told


def test_a_limit_that_no_image_fits_in_is_told_at_once(tmp_path):
    path = multimodal.gme(tmp_path / "gme")
    with pytest.raises(
        OptionError, match="max_length is 100; an image takes 300 tokens at least with the prompt"
    ):
        build(path, max_length=100)
    assert build(path, max_length=100, min_image_tokens=4).name == "tiny"
    with pytest.raises(OptionError, match="at least 2000 and at most 1280 tokens"):
        build(path, min_image_tokens=2000)


def test_a_model_of_images_says_its_type_itself(tmp_path):
    path = multimodal.clip(tmp_path / "clip")
    config = json.loads((path / "config.json").read_text())
    del config["model_type"]
    write_json(path / "config.json", {**config, "hidden_size": 32})
    with pytest.raises(
        CheckpointError, match="has no model_type; a model of texts and images needs one there"
    ):
        build(path, model_type="clip", max_length=77)
